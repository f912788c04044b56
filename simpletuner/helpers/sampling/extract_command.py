"""`simpletuner extract`: a LoRA from two models, whose weights are read layer by layer."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.adapters.files.export import with_suffix
from simpletuner.helpers.adapters.files.extraction import ExtractOptions, TwoModels, extract_lora
from simpletuner.helpers.adapters.files.rewriting import Rewritten
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.new_files import refuse_existing
from simpletuner.helpers.models.denoiser_weights import (
    Denoiser,
    differing_text_encoders,
    find_denoiser,
    weight_reader,
    with_weights,
)


def extract(
    base: str,
    tuned: str,
    output: Path,
    *,
    options: ExtractOptions,
    model: str | None = None,
    overwrite: bool = False,
) -> Rewritten:
    """Write the LoRA that makes one model of another.

    Args:
        base: Folder or repository in the diffusers layout, or single .safetensors file.
        tuned: The same, of the model that the LoRA should make.
        output: The file to write, with .safetensors added where it is missing.
        options: Rank, targets, layout and dtype.
        model: Folder or repository with the denoiser's configuration, for two single files.
        overwrite: Replace a file that exists.

    Raises:
        ModelError: A model is missing, damaged or of no known family.
        AdapterError: The models are of different architectures or equal, or an option is invalid.
        StorageError: The file cannot be written, or exists and may not be replaced.
    """
    target = with_suffix(output)
    refuse_existing([target], overwrite=overwrite)
    places = {"--base": base, "--tuned": tuned}
    found = _denoisers(places, model)
    components = {
        option: with_weights(found[option], where, option=option) for option, where in places.items()
    }
    denoiser, spec = found["--base"].on_meta(), found["--base"].spec
    with (
        weight_reader(components["--base"], denoiser, spec=spec) as read_base,
        weight_reader(components["--tuned"], denoiser, spec=spec) as read_tuned,
    ):
        models = TwoModels(
            denoiser=denoiser,
            base=read_base,
            tuned=read_tuned,
            base_name=base,
            tuned_name=Path(tuned).name,
        )
        return extract_lora(models, target, options, spec=spec, notes=_text_notes(base, tuned))


def _denoisers(places: dict[str, str], model: str | None) -> dict[str, Denoiser]:
    """Option -> the denoiser of its model; a single file has the other's configuration, or `model`'s."""
    files = {option for option, where in places.items() if Path(where).is_file()}
    found = {
        option: find_denoiser(where, option=option) for option, where in places.items() if option not in files
    }
    if not found:
        if model is None:
            raise ModelError(
                f"{places['--base']} and {places['--tuned']} are single files, which have no configuration. "
                "Give --model, a folder or repository with that of their denoiser."
            )
        found["--model"] = find_denoiser(model, option="--model")
    first, *others = found.values()
    if any(each.family != first.family for each in others):
        families = ", ".join(f"{option} is of the family {each.family}" for option, each in found.items())
        raise ModelError(f"The models are of different architectures: {families}. Give two of one.")
    return {option: found.get(option, first) for option in places}


def _text_notes(base: str, tuned: str) -> list[str]:
    if not (Path(base).exists() and Path(tuned).exists()):
        return ["Text encoders: not compared, since a model is a repository; they are not extracted."]
    differing = differing_text_encoders(base, tuned)
    if differing is None:
        return ["Text encoders: not compared, since the models hold different ones; they are not extracted."]
    if differing:
        return [f"Text encoders: {', '.join(differing)} differ; they are not extracted."]
    return []
