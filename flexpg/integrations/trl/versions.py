"""Which versions of TRL the trainers work with.

What they touch is private to TRL and may change in any release. So versions other than the tested one are accepted,
with a warning, if these parts still have the expected form, and refused otherwise, when this module is imported.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

TESTED = "1.16"
OLDEST = (1, 16)
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")  # of its fused output


def check_version() -> None:
    """Refuse versions of TRL in which a part is missing, and warn of those that are not tested.

    Raises:
        ImportError: If TRL is not installed, too old, or has changed.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        installed = "none"
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        raise ImportError(
            f"trl must be {TESTED} or newer, got {installed}: pip install 'flexpg[trl]' or 'trl=={TESTED}.*'"
        )
    import trl
    from trl.trainer import utils

    if missing := missing_parts(trl, utils):
        raise ImportError(
            f"trl {installed} has changed where flexpg extends it ({', '.join(missing)}): pip install 'trl=={TESTED}.*'"
        )
    if not installed.startswith(f"{TESTED}."):
        warnings.warn(
            f"flexpg was tested with trl {TESTED}, and {installed} is installed; compare the losses of a few steps "
            "with those of TRL's own trainer",
            stacklevel=2,
        )


def missing_parts(trl: ModuleType, utils: ModuleType) -> list[str]:
    """Return the private parts of TRL that flexpg uses and that are missing or have changed.

    Args:
        trl: The package.
        utils: Its module `trl.trainer.utils`.
    """
    missing = []
    output = getattr(utils, "FusedCausalLMOutput", None)
    names = () if output is None else {field.name for field in fields(output)}
    missing += [f"FusedCausalLMOutput.{name}" for name in PER_TOKEN if name not in names]
    if "shift_labels" not in inspect.getsource(utils):
        missing.append("shift_labels")
    functions = {"add_fused_lm_head": "model", "split_tensor_dict": "num_chunks"}
    functions |= dict.fromkeys(("split_pixel_values_by_grid", "unsplit_pixel_values_by_grid"), "batch")
    for name, parameters in functions.items():
        if parameters not in inspect.signature(getattr(utils, name, lambda: None)).parameters:
            missing.append(f"{name}({parameters})")
    for trainer in ("GRPOTrainer", "RLOOTrainer"):
        source = inspect.getsource(getattr(trl, trainer))
        missing += [
            f"{trainer}.{name}" for name in ("_prepare_inputs", "_buffered_inputs", "_step") if name not in source
        ]
        if "fused_lm_head=True" not in source:
            missing.append(f"the fused output layer of {trainer}")
    if "fused_lm_head=True" not in inspect.getsource(trl.DPOTrainer):
        missing.append("the fused output layer of DPOTrainer")
    return missing


check_version()
