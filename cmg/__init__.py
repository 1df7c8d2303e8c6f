"""The method, class-mixed generation: read reference.py first, then mixing.py, losses.py and scores.py.

config     every option of stage 2, once; the command line is made from it
mixing     how the embeddings of two classes become one
losses     the losses that fine-tune the head, with their margins, and the modes that name them
scores     OOD scores of logits
pseudo_ood class-mixed codes -> pseudo-OOD images -> features
reference  stage 2 as the paper reads, in plain PyTorch
engine     the same, every mode and seed in one pass over features computed once
stage2     from checkpoints and images to results; data, results, joint and detector serve it
"""
