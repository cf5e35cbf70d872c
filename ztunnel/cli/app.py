"""The command tree and the frame around every verb: help, errors as one line, exit codes.

A verb is a module of ztunnel.cli.verbs that is imported when it is asked for; those modules import what they
need inside their functions, so that `ambient --help` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from ztunnel.cli.errors import UserError

VERBS = {
    "up": "ztunnel.cli.verbs.up",
    "down": "ztunnel.cli.verbs.down",
    "ca": "ztunnel.cli.verbs.ca",
    "status": "ztunnel.cli.verbs.status",
    "install": "ztunnel.cli.verbs.install",
    "upgrade": "ztunnel.cli.verbs.upgrade",
    "uninstall": "ztunnel.cli.verbs.uninstall",
    "apply": "ztunnel.cli.verbs.apply",
    "delete": "ztunnel.cli.verbs.delete",
    "get": "ztunnel.cli.verbs.get",
    "label": "ztunnel.cli.verbs.label",
    "waypoint": "ztunnel.cli.verbs.waypoint",
    "exec": "ztunnel.cli.verbs.exec",
    "logs": "ztunnel.cli.verbs.logs",
    "check": "ztunnel.cli.verbs.check",
    "analyze": "ztunnel.cli.verbs.analyze",
    "authz": "ztunnel.cli.verbs.authz",
    "proxy-status": "ztunnel.cli.verbs.proxy_status",
    "proxy-config": "ztunnel.cli.verbs.proxy_config",
    "tap": "ztunnel.cli.verbs.tap",
    "capture": "ztunnel.cli.verbs.capture",
    "stat": "ztunnel.cli.verbs.stat",
    "top": "ztunnel.cli.verbs.top",
    "graph": "ztunnel.cli.verbs.graph",
    "demo": "ztunnel.cli.verbs.demo",
}


class Examples(click.Command):
    """A command whose help ends with examples that can be pasted, one a line."""

    def __init__(self, *args: object, examples: Sequence[str] = (), **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, without re-wrapping them."""
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)


class ExamplesGroup(Examples, click.Group):
    """A command with commands of its own, whose help ends with examples, too."""


class Verbs(click.Group):
    """The `ambient` group: knows its verbs by name and imports only the one that is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which one meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its `command`; None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb, by istioctl's other name for it too. Raises UsageError, which says what comes nearest."""
        from ztunnel.cli import habits

        word, *others = args
        word = habits.ALIASES.get(word, word)
        if word not in VERBS and not word.startswith("-") and not ctx.resilient_parsing:
            told = habits.of_verb(word, VERBS)
            raise click.UsageError(f"there is no verb {word!r}{'; ' if told else ''}{told}", ctx)
        return super().resolve_command(ctx, [word, *others])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, without re-wrapping them."""
        write_examples(
            (
                "ambient install                 # the mesh in the kubeconfig's cluster",
                "ambient up shop/                # or here: a mesh of the resources in shop/*.yaml, until Ctrl-C",
                "ambient demo                    # a bookshop in a mesh, measured and proved, in half a minute",
                "ambient label namespace default istio.io/dataplane-mode=ambient",
                "ambient exec deploy/web -- curl -s http://reviews:9080/",
            ),
            formatter,
        )


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Add the section "Examples:" to a help page."""
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"  {example}\n")


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from ztunnel import __version__

        click.echo(f"ambient {__version__}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
def ambient() -> None:
    """An ambient service mesh: the traffic of pods is carried between nodes in mutual TLS tunnels, without sidecars. In
    a Kubernetes cluster (install), or on this machine (up), where pods are network namespaces with your programs.

    Verbs act on the mesh that runs here, else on the kubeconfig's cluster; --kubeconfig or --context name one.
    `ambient VERB --help` shows a verb's options and examples.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: sys.argv[1:]) and return the exit code.

    0 done, 1 failed or not found, 2 wrong usage, 130 interrupted; `exec` returns its program's own.
    """
    try:
        result = ambient.main(args=arguments, prog_name="ambient", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return error.code
    except BrokenPipeError:
        # The reader of our output left (`ambient get pods | head`): what is left in the buffer has no home, and
        # the interpreter would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        click.echo(f"error: {what}", err=True)
        return 1
    except Exception as error:
        if not _told(error):
            raise
        return 1
    return result if isinstance(result, int) else 0


def _told(error: Exception) -> bool:
    """Show an error of the store or of a cluster's API server, which say the remedy themselves; False for others."""
    from ztunnel.store.problems import StoreError

    if not isinstance(error, StoreError):
        return False
    click.echo(f"error: {error}", err=True)
    return True
