"""What Flower's programs said is told as a person reads it."""

from pathlib import Path

from server.flower_programs import TAIL_LINES, tail


def test_tail_is_the_end_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"\x1b[92mline {i}\x1b[0m" for i in range(100)))
    assert tail(log, 2) == "line 98\nline 99"
    assert len(tail(log).splitlines()) == TAIL_LINES


def test_a_log_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert tail(tmp_path / "log") == ""
