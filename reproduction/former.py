"""Files of results as they were written before, under the names of today."""

from __future__ import annotations

from cli.options import option_fields
from cmg.config import FineTuneConfig
from datasets.tasks import PRETRAINED

FORMER = "untouched"  # what the step before fine-tuning was called
MIXINGS = {"coin": "bernoulli", "weight": "mixup"}


def with_todays_names(content: dict) -> dict:
    """The content of a result of eval or of the ablations; itself where it has today's names already."""
    if "config" not in content or "ind_quantile" not in content["config"]:
        return content
    named = {PRETRAINED if key == FORMER else key: value for key, value in content.items()}
    named |= {key: _rows(named[key]) for key in ("detection", "ind", PRETRAINED) if key in named}
    named["config"] = _config(content["config"])
    if "variants" in named:
        named["variants"] = {
            name: one | {"config": _config(one["config"])} | {key: _rows(one[key]) for key in ("detection", "ind")}
            for name, one in named["variants"].items()
        }
    return named


def with_todays_keys(scores: dict) -> dict:
    """The same for an archive of scores, whose keys are METHOD/SEED/STEP/IMAGES."""
    return {key.replace(f"/{FORMER}/", f"/{PRETRAINED}/"): values for key, values in scores.items()}


def _rows(rows: list[dict]) -> list[dict]:
    return [row | {"at": PRETRAINED} if row.get("at") == FORMER else row for row in rows]


def _config(config: dict) -> dict:
    """A configuration of stage 2 with the fields of `cmg.config.FineTuneConfig`."""
    since = {name: field.default for name, field in option_fields(FineTuneConfig).items() if name not in config}
    former = ("mixing", "score_energy", "ind_quantile", "pseudo_quantile", "check_every")
    return (
        since
        | {name: value for name, value in config.items() if name not in former}
        | {
            "mixing": MIXINGS.get(config["mixing"]["kind"], config["mixing"]["kind"]),
            "mixing_probability": config["mixing"]["probability"],
            "score": {"ind": None, "all": "energy-all"}[config["score_energy"]],
            "margins": [config["ind_quantile"], config["pseudo_quantile"]],
            "eval_every": config["check_every"],
        }
    )
