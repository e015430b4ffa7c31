"""A child process must not outlive its parent: an orphan would go on writing into a folder that a new run has taken."""

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """Call in a child made by multiprocessing: it ends at once when its parent is gone, even by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a child process"

    def watch() -> None:
        parent.join()  # the kernel closes the pipe behind it when the parent dies, however it dies
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
