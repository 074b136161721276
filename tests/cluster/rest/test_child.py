"""A process beside this one, which is replaced when it has grown."""

from longreach.cluster.rest.child import ChildProcess

from . import growing


def test_what_a_process_takes_to_begin_with_is_no_growth() -> None:
    process = ChildProcess(growing.__name__, 2 * growing.MOST_GROWTH, 60.0)
    try:
        first, second = process.do(1), process.do(growing.MOST_GROWTH // 2)
        assert first == second
        grown = process.do(4 * growing.MOST_GROWTH)
        assert grown == first
        assert process.do(1) != first
    finally:
        process.end()
