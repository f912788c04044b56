"""The optional packages that a run will need, looked for before anything is loaded or encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.helpers.io.optional import check_installed

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

# A value of the configuration ends in this -> package, extra.
PRECISION_PACKAGES = {"-torchao": ("torchao", "quant"), "-bnb": ("bitsandbytes", "quant")}
OPTIMIZER_PACKAGES = {"prodigy": ("prodigyopt", "optim")}
TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "track")}


def check_packages(config: RunConfig) -> None:
    """See that every optional package that this configuration asks for is installed.

    Raises:
        MissingDependencyError: One is not; the message says what needs it and how it is installed.
    """
    for key, value in config.precision:
        for suffix, (module, extra) in PRECISION_PACKAGES.items():
            if isinstance(value, str) and value.endswith(suffix):
                check_installed(module, extra=extra, needed_for=f"{key} {value}")
    if (optimizer := config.optimizer.optimizer) in OPTIMIZER_PACKAGES:
        module, extra = OPTIMIZER_PACKAGES[optimizer]
        check_installed(module, extra=extra, needed_for=f"optimizer {optimizer}")
    for tracker in config.tracking.report_to:
        if tracker in TRACKER_PACKAGES:
            module, extra = TRACKER_PACKAGES[tracker]
            check_installed(module, extra=extra, needed_for=f"report_to {tracker}")
