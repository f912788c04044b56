"""The command `simpletuner init`: a few questions, then a configuration that can be started."""

import sys
from typing import Annotated, Literal

import typer

Text = str | None


def init(
    *,
    images: Annotated[Text, typer.Option("--images", metavar="DIR", help="Folder of your images.")] = None,
    purpose: Annotated[
        Text, typer.Option("--purpose", metavar="PURPOSE", help="What they show: subject or style.")
    ] = None,
    trigger: Annotated[
        Text, typer.Option("--trigger", metavar="TEXT", help='Words that stand for it, as in "sks dog".')
    ] = None,
    model: Annotated[
        Text, typer.Option("--model", metavar="MODEL", help="A model of --list-presets, or embedded.")
    ] = None,
    memory: Annotated[
        Text, typer.Option("--memory", metavar="GB", help="Memory of the graphics card. Default: this one's.")
    ] = None,
    time: Annotated[
        Text, typer.Option("--time", metavar="TIME", help="Length of training: short, usual or long.")
    ] = None,
    name: Annotated[
        Text, typer.Option("--name", metavar="NAME", help="Folder below config. Default: as the images'.")
    ] = None,
    language: Annotated[
        Literal["en", "ja"] | None, typer.Option("--language", help="Default: by the locale.")
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="List the presets with their memory, and end.")
    ] = False,
) -> None:
    """Ask a few questions and write config/NAME: a configuration, and a page on why and what next."""
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.new_run.questions import Questions, Terminal
    from simpletuner.helpers.new_run.summary import plan, preset_lines
    from simpletuner.helpers.new_run.texts import Texts, language_of_locale
    from simpletuner.helpers.new_run.writing import start_command, write_configuration

    texts = Texts(language or language_of_locale())
    if list_presets:
        for line in preset_lines(texts, specs=registry.specs()):
            print(line)
        return
    options = {
        "images": images,
        "purpose": purpose,
        "trigger": trigger,
        "model": model,
        "memory": memory,
        "time": time,
        "name": name,
    }
    can_answer = sys.stdin.isatty() and sys.stdout.isatty()
    answers = Questions(options, texts, Terminal(print, _ask) if can_answer else None).answers()
    written = write_configuration(answers, texts, specs=registry.specs())
    print()
    for line in plan(answers, written, texts):
        print(line)
    print()
    print(texts("read_on", readme=written.page))
    print(f"{texts('start')} {start_command(answers.name)}")


def _ask(question: str, default: Text) -> str:
    return str(typer.prompt(question, default=default))
