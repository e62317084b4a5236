"""`eyas-device service`: install the agent as a service of systemd, or remove it.

`install`, as root, adds the user `eyas`, the folders of configuration and state, udev rules and the hardened units,
which run this environment's program, and enables them: eyas-device classifies, eyas-device-update looks for signed
releases and ends at once without [update] url. Without --config, a configuration that is missing is written from the
example. One that is there is never changed. Running it again changes nothing. With --agent-updates, or [update] agent
in the configuration, root's units eyas-device-agent-update exchange the agent by signed releases, too.
`uninstall` stops and removes the service; user, configuration, models and messages stay.
"""

from __future__ import annotations

import argparse

from eyas_device.commands import values

HELP = "install the agent as a service of systemd, or remove it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("action", choices=("install", "uninstall"), metavar="install|uninstall")
    parser.add_argument("--config", type=values.path, metavar="FILE", help="install: the device's configuration")
    parser.add_argument(
        "--name", default="", metavar="INSTANCE", help="one of several cameras: service eyas-device@INSTANCE"
    )
    parser.add_argument(
        "--agent-updates", action="store_true", help="install: signed releases may exchange the agent itself, as root"
    )
    parser.add_argument("--now", action="store_true", help="install: also start the service, or restart it")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done; root is not needed")


def main(args: argparse.Namespace) -> int:
    """Print each change, and what comes next."""
    import os

    from eyas_device.agent.service import Service, ServiceError, run_command
    from eyas_device.support.logs import show

    os.umask(0o022)  # the service's user has to find what is made here
    service = Service(args.name, say=show, dry_run=args.dry_run, agent_updates=args.agent_updates)
    if args.action == "uninstall":
        if args.config is not None or args.now or args.agent_updates:
            raise ServiceError("--config, --agent-updates and --now are for `service install`")
        if service.uninstall():
            show(f"{service.config} and {service.state} stay")
        else:
            show(f"{service.unit} is not installed; nothing to do")
        return 0
    if not service.install(args.config):
        show(f"{service.unit} is installed as it should be")
    if args.dry_run:
        return 0
    if not service.can_start:
        show(f"next: set [camera] source in {service.config}, then: systemctl start {service.unit}")
    elif args.now:
        run_command(["systemctl", "restart", service.unit, service.updater])
        show(f"{service.unit} runs; eyas-device status shows what it does")
    else:
        show(f"next: systemctl start {service.unit}")
    return 0
