"""Signals become a flag, then an exception, and old handlers come back."""

import os
import signal
import threading

import pytest

from engine_fast.training.interrupt import catching_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag_second_raises(number):
    before = signal.getsignal(number)
    with catching_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal is number
        with pytest.raises(KeyboardInterrupt, match="second signal"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_train_without_handlers():
    result = []

    def body():
        with catching_signals() as stop:
            result.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert result == [False]
