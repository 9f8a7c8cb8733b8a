"""Work in processes of their own, whose crash or endless loop costs one task."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager

from utils.progress import Progress

LIMIT = 300  # seconds a task: one that takes longer hangs
DIED = "crashed its reader, or kept it busy for over five minutes"
MOST_WORKERS = 64  # each takes eight open files, and many systems allow 1024


@contextmanager
def time_limit(seconds: float = LIMIT):
    """Ends this process where the block takes longer: nothing gentler stops a decoder that hangs in compiled code."""
    with open(os.devnull, "wb") as silent:  # takes the traceback that comes with it
        faulthandler.dump_traceback_later(seconds, exit=True, file=silent)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def parallel(function, tasks: list, workers: int, title: str, chunk: int = 8) -> list:
    """[function(task) for task in tasks] over processes; None for a task whose process died: decoders can crash.

    function: of a module, and it sets its own time limit. What it raises is raised here. A process gets up to `chunk`
    tasks at a time, as a message costs about as much as reading a header. Where it dies, they are tried one by one.
    """
    workers = min(workers, MOST_WORKERS)
    chunk = max(1, min(chunk, len(tasks) // (4 * workers)))
    spawn = os.name == "nt" or len(tempfile.gettempdir()) > 70  # a socket there may have a name of 107 characters
    context = multiprocessing.get_context("spawn" if spawn else "forkserver")
    module = getattr(function, "func", function).__module__  # of a partial, that of what it calls
    context.set_forkserver_preload([module, "utils.cli"])  # a process starts in milliseconds
    if not spawn:  # what is born ignores Ctrl-C from the start, before it comes to `_begin`
        from multiprocessing.forkserver import ensure_running
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        ensure_running()
        signal.signal(signal.SIGINT, before)
    own = threading.local()  # a process a thread: it is clear whose tasks killed it, and the other processes go on

    def run(part):
        try:
            if not hasattr(own, "process"):
                own.process = processes.enter_context(ProcessPoolExecutor(1, context, initializer=_begin))
            return list(own.process.map(function, part, chunksize=len(part)))
        except BrokenProcessPool:
            own.process.shutdown()
            del own.process
            return [None] if len(part) == 1 else [answer for task in part for answer in run([task])]

    results, parts = [], [tasks[k : k + chunk] for k in range(0, len(tasks), chunk)]
    with ExitStack() as processes, ThreadPoolExecutor(workers) as threads:
        bar = processes.enter_context(Progress(total=len(tasks), desc=title, unit="file"))
        for answers in threads.map(run, parts):
            results += answers
            bar.update(len(answers))
    return results


def _begin():
    # Ctrl-C reaches all processes: the parent waits until the others have done what they are at. A parent that is
    # killed cannot tell them to end, so they watch it. What decoders in compiled code print of each damaged byte goes
    # nowhere: the report names the file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "wb") as silent:
        os.dup2(silent.fileno(), 2)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
