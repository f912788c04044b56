"""Names and messages use the words of documentation/glossary.md, not those that they replaced."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.package_source import Module, assert_only, modules

# Word, as a part of a name and in a text -> the word for it.
REPLACED = {
    "picture": "image",
    "pictures": "images",
    "studio": "validation sampler",
    "shot": "prompt",
    "shots": "prompts",
    "lesson": "curriculum entry",
    "lessons": "curriculum",
    "toy": "character",
    "toys": "characters",
    "judge": "evaluate",
    "told": "guidance embedding",
    "untold": "guidance embedding",
    "lam": "lambda",
    "dlam": "delta lambda",
}
# Whole names -> theirs.
REPLACED_NAMES = {
    "Ground": "RunContext",
    "lay_ground": "prepare_run",
    "assemble": "build_components",
    "Window": "StepAccumulator",
    "Noised": "NoisyBatch",
    "noised_batch": "add_noise",
    "StepStats": "MicroBatchOutput",
    "StepRecord": "StepMetrics",
    "FamilyFacts": "ModelSpec",
    "Family": "ModelFamily",
    "Description": "TLoraSpec",
    "Recipe": "NetworkBuilder",
    "Places": "KeyMap",
    "OriginalRows": "FusedSlice",
    "PlainLayer": "LoraLayer",
    "note_base": "set_base_hashes",
    "start_from": "init_from",
    "draw_sigma": "sample_sigma",
    "timestep_of": "sigma_to_timestep",
    "model_times": "timestep_input",
    "ranks_for": "rank_mask_for",
    "asks_for_nothing": "is_noop",
    "say_once": "log_once",
    "one_ahead": "prefetch",
    "run_settings": "resume_fingerprint",
    "refuse_other_run": "check_compatible",
    "dense_weight": "dequantize",
    "is_packed": "is_quantized",
    "spare_threads": "limit_cpu_threads",
    "lasting_file": "cached_path",
    "tidy": "remove_stale",
}
PHRASES = re.compile(r"\bis told\b|\bare told\b|\bso many\b|\bthat it was made with\b")
# "module name" -> why it keeps its word.
KEPT_NAMES: dict[str, str] = {
    "simpletuner/demo/pretrain.py num_pictures": "a key of the shipped training.json",
}
# "module word" -> why it stands in a text there.
KEPT: dict[str, str] = {
    "simpletuner/demo/comparison/concepts.py toy": "a prompt, and the embedded model knows the word",
    "simpletuner/demo/regularisation.py toy": "the same",
    "simpletuner/helpers/models/tiny_parts.py picture": "a word of the tiny tokenizer",
    "simpletuner/helpers/models/tiny_parts.py studio": "a word of the tiny tokenizer",
    "simpletuner/helpers/reporting/html_report/gallery.py pictures": "a CSS class",
}


def test_no_name_has_a_word_that_was_replaced() -> None:
    found = {
        f"{module} {name}"
        for module in modules()
        for name in _names(module)
        if name in REPLACED_NAMES or _words(name) & REPLACED.keys()
    }
    assert_only(found, allowed=KEPT_NAMES)


def test_no_message_has_a_word_that_was_replaced() -> None:
    found = {
        f"{module} {word}"
        for module in modules()
        for text in _messages(module)
        for word in set(PHRASES.findall(text)) | (set(re.findall(r"[a-z]+", text.lower())) & REPLACED.keys())
    }
    assert_only(found, allowed=KEPT)


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _names(module: Module) -> Iterator[str]:
    """What a module names itself: classes, functions, parameters, variables and attributes that it sets."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _messages(module: Module) -> Iterator[str]:
    """Texts of more than one word, docstrings excepted."""
    docstrings = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if " " in node.value.strip():
            yield node.value
