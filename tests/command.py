"""The command `pamm`, run in the test's own process."""

from __future__ import annotations

from pamm.cli import main


def run_command(capsys, *arguments: object, code: int = 0) -> str:
    """Run it, expect an exit code and no traceback; returns what it said."""
    try:
        result = main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        result = leaving.code
    captured = capsys.readouterr()
    assert result == code, captured
    assert "Traceback" not in captured.err
    return captured.err + captured.out
