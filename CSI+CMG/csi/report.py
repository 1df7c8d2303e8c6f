"""CSI's own rows of the tables."""

from __future__ import annotations

from torch import Tensor

from csi.network import CSINet
from csi.scores import VIEWS
from datasets.datasetsHelper import Images
from evaluation.report import detection_row, ind_figures
from evaluation.scores import msp_score


def csi_rows(view: str, model: CSINet, test: Images, ood: dict[str, Tensor], classes: int, precision: str) -> dict:
    """What the network reaches with a view, a key of `VIEWS`: "ind" and "detection" rows, one of those per OOD set."""
    method = f"CSI, {view}"
    logits = VIEWS[view](model, test.images, precision)
    ind_scores = msp_score(logits)
    detection = [
        detection_row(method, name, None, "untouched", ind_scores, msp_score(VIEWS[view](model, images, precision)))
        for name, images in ood.items()
    ]
    ind = {"method": method, "at": "untouched"} | ind_figures(logits, test.labels, classes)
    return {"ind": [ind], "detection": detection}
