"""The service's user's side of an update of the agent: collect what is wanted, and ask root's unit to look at it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eyas_device.config import Config
from eyas_device.updates.agent_mirror import AgentMirror
from eyas_device.updates.agent_release import AgentUpdateRecord, agent_device, decide_agent
from eyas_device.updates.fetch import Progress
from eyas_device.updates.plan import Install, Keep, wanted_target
from eyas_device.updates.progress import ROOT_STATE, read_record_of
from eyas_device.updates.release import AGENT

ROOT_UNIT = Path("/etc/systemd/system/eyas-device-agent-update.path")
"""Root's unit; without it nobody here can exchange the agent."""


def offer_agent(
    config: Config, *, url: str = "", progress: Progress = lambda done, total: None, root_state: Path = ROOT_STATE
) -> str:
    """Collect the release of the agent that the repository wants, if it is not what runs.

    Args:
        config: The device's configuration.
        url: Repository in place of `update.url`.
        progress: Called while wheels arrive.
        root_state: Root's own folder.

    Returns:
        `name version` of what was collected; empty if nothing was.

    Raises:
        UpdateError: The repository cannot be trusted or reached, or the wheels do not fit.

    """
    section = msgspec.structs.replace(config.update, url=url or config.update.url)
    mirror = AgentMirror(section, config.device.site, Path(config.device.state))
    with mirror.open() as repository:
        repository.refresh()
        channel = repository.channel(AGENT)
        target = wanted_target(channel, agent_device(config))
        if isinstance(target, Keep) or channel is None:
            mirror.clean()
            return ""
        release, _ = repository.release(target)
        record = read_record_of(root_state, AgentUpdateRecord)
        plan = decide_agent(release, channel, repository.policy(), config, record)
        if not isinstance(plan, Install):
            return ""
        mirror.add(plan.variant, repository, progress)
    mirror.request()
    return f"{release.model} {release.version}"
