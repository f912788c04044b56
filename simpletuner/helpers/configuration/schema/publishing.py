"""The section of config.json on the model card and its upload."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from simpletuner.helpers.configuration.schema.base import OptionalText, Section
from simpletuner.helpers.configuration.schema.values import hub_repository


class PublishingConfig(Section):
    """Upload to the Hugging Face hub, and the model card, which every run writes."""

    push_to_hub: bool = False
    """Upload the adapter and its model card when the run is finished, in the background. Needs a login:
    hf auth login, or the environment variable HF_TOKEN."""
    push_checkpoints_to_hub: bool = False
    """Also upload the adapter of every checkpoint; without push_to_hub nothing is uploaded."""
    hub_model_id: Annotated[str | None, BeforeValidator(hub_repository)] = None
    """Repository, owner/name, or name for the owner of the login. Default: tracker_project_name."""
    model_card_private: bool = True
    """Create the repository private, and upload to none that is public."""
    model_card_safe_for_work: bool = False
    """Leave the tag not-for-all-audiences out of the model card."""
    model_card_note: OptionalText = None
    """Text at the head of the model card, in Markdown."""
