from __future__ import annotations

import os
import signal
import threading

import pytest

from gdn.train.stop import StopRequest, exit_code


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request_and_the_second_has_its_usual_effect(number: int, status: int) -> None:
    class Usual(Exception):
        pass

    def usual(*_: object) -> None:
        raise Usual

    before = signal.signal(number, usual)
    try:
        with StopRequest() as request:
            assert request.received == 0
            os.kill(os.getpid(), number)
            assert request.received == number
            assert exit_code(request.received) == status
            with pytest.raises(Usual):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_handlers_are_given_back_without_a_signal() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert exit_code(0) == 0


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
