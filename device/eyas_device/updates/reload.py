"""Let the running agent load the current slot's model, and wait for what becomes of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from eyas_device.errors import EyasError
from eyas_device.updates.records import AgentRecord, read_agent

TIMEOUT_S = 300.0
"""A runtime may build an engine for this device first."""
_POLL_S = 0.1


def request_reload(state: Path, timeout_s: float = TIMEOUT_S) -> AgentRecord | None:
    """What the agent of a state folder runs after a reload; None without an agent.

    Raises `EyasError` if it may not be asked, ends meanwhile, or has no outcome in time.
    """
    agent = read_agent(state)
    if agent is None:
        return None
    requested = time.monotonic()
    try:
        os.kill(agent.pid, signal.SIGHUP)
    except OSError as error:
        raise EyasError(f"process {agent.pid}: {error.strerror}; use the service's user or root") from None
    while agent is not None and agent.loaded < requested:
        if time.monotonic() - requested > timeout_s:
            raise EyasError(f"no outcome within {timeout_s:g} s; see journalctl -u eyas-device")
        time.sleep(_POLL_S)
        agent = read_agent(state)
    if agent is None:
        raise EyasError("the agent ended during the reload; see journalctl -u eyas-device")
    return agent
