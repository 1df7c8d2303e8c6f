"""Commands called as a user does, within the process."""

from __future__ import annotations

from cli.errors import run_command


def run(command, *argv: object) -> int:
    return run_command(command.main, command.get_parser(), [str(word) for word in argv])


def error_of(capsys, command, *argv: object) -> str:
    """The one line on which a command that must fail says why."""
    capsys.readouterr()
    try:
        status = run(command, *argv)
    except SystemExit as exit:  # of argparse
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"{command.get_parser().prog}: error: ") and error.count("\n") == 1
    return error.rstrip("\n")
