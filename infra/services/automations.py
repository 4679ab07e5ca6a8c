"""Gives Prefect's server the automations of automations.yaml and announcements.yaml, in place of their namesakes.

`python -m infra.services.automations [--announce-by TYPE/NAME]`, with the server of the root's services.env or of
PREFECT_API_URL. The block, say `slack-webhook/team`, is made on Prefect's page under Blocks; without one nothing is
announced.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines.doctor.servers import barred_from_prefect
from pipelines.errors import CodecmillError, InputError
from pipelines.run_directory import Root
from pipelines.service_addresses import use_services

INFRA = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help="folder [codecmill-data]")
    parser.add_argument("--announce-by", metavar="TYPE/NAME", help="a notification block")
    arguments = parser.parse_args()
    try:
        root = Root(arguments.root)
        use_services(root)
        _must_be_reached(root)
        for name in asyncio.run(apply(arguments.announce_by)):
            print(f"Applied: {name}")
    except CodecmillError as error:
        print(f"automations: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _must_be_reached(root: Root) -> None:
    """Where no server is named, Prefect's client would start one of its own, which is gone with all it was given."""
    if not os.environ.get("PREFECT_API_URL"):
        raise InputError(
            f"There is no server to apply them to: PREFECT_API_URL is empty, and {root.services_file.absolute()} names "
            "none. Start `make services`, or name its folder with --root."
        )
    if found := barred_from_prefect():
        raise CodecmillError(f"Prefect's server at {found.text}. {found.remedy}")


async def apply(block: str | None) -> list[str]:
    """Create or replace them; returns their names.

    Raises:
        InputError: there is no such block.
    """
    from prefect.client.orchestration import get_client  # after the environment says which server
    from prefect.events.schemas.automations import AutomationCore

    wanted = _read("automations.yaml")
    if block is not None:
        identity = await _block_id(block)
        for each in _read("announcements.yaml"):
            for action in each["actions"]:
                action["block_document_id"] = identity
            wanted.append(each)
    async with get_client() as client:
        for each in wanted:
            former = await client.read_automations_by_name(each["name"])
            await client.create_automation(AutomationCore.model_validate(each))
            for old in former:
                await client.delete_automation(old.id)
    return [each["name"] for each in wanted]


def _read(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((INFRA / name).read_text(encoding="utf-8"))["automations"]


async def _block_id(block: str) -> str:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    try:
        async with get_client() as client:
            return str((await client.read_block_document_by_name(name, kind)).id)
    except ObjectNotFound:
        raise InputError(
            f"Prefect has no block '{block}'. Make it on its page, under Blocks; name it TYPE/NAME."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
