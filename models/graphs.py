"""CUDA graphs: what a function launches is recorded once and from then on launched by one call of the host.

A chain's expensive pieces depend on no decision of the host: the network, data consistency, D. They are called through
a `Graphs`; between them a sampler decides. docs/performance.md says more.
"""

import warnings
from collections import OrderedDict
from weakref import WeakValueDictionary

import torch

PLAIN_CALLS = 3  # before a graph is made, which costs about as much: what is rare loses nothing
KEPT = 128       # functions and shapes that are remembered; those used longest ago go first


def directly(key, function, *inputs):
    """function(*inputs), in place of a `Graphs`: the host launches every kernel."""
    return function(*inputs)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


class Graphs:
    """`graphs(key, function, *inputs)` is function(*inputs), on a GPU from the fourth call on by a CUDA graph.

    function: from tensors to one tensor, without asking for values. It may read other memory, such as weights, that is
    not freed as long as the key lives. key: hashable, all that the result depends on besides the inputs; each key has a
    graph for each of its inputs' shapes and types. The result is the caller's. Not for several threads or streams.
    Where a graph cannot be made there is a warning, and functions are called from then on.
    """

    def __init__(self, kept: int = KEPT):
        self.kept, self.known, self.works = kept, OrderedDict(), True  # known: key -> (what replays, calls)
        self.buffers = WeakValueDictionary()  # that graphs read their inputs from, common to all: they run in turn
        self.stream = self.pool = None

    def __reduce__(self):
        return Graphs, (self.kept,)  # a copy, of copied networks, begins anew

    def __call__(self, key, function, *inputs: torch.Tensor) -> torch.Tensor:
        if not self.works or not _on_gpu(inputs[0]):
            return function(*inputs)
        key = key, *((x.shape, x.dtype, x.device) for x in inputs)
        replay, calls = self.known.pop(key, (None, 0))
        if calls == PLAIN_CALLS:
            replay = self._captured(function, inputs)
        self.known[key] = replay, calls + 1
        if len(self.known) > self.kept:
            self.known.popitem(last=False)
        return replay(*inputs) if replay else function(*inputs)

    def _captured(self, function, inputs):
        """What replays the function as a graph; None, with a warning, where that cannot be."""
        buffers = [self.buffers.setdefault((i, x.shape, x.dtype, x.device), torch.empty_like(x))
                   for i, x in enumerate(inputs)]

        def fill(inputs):
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x)

        fill(inputs)
        now = torch.cuda.current_stream(inputs[0].device)
        try:
            if self.stream is None:
                self.stream, self.pool = torch.cuda.Stream(inputs[0].device), torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                function(*buffers)  # what compiles, chooses or fills a cache does it here and not while recording
            now.wait_stream(self.stream)
            # thread_local: another thread may go on loading data meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function(*buffers)
        except RuntimeError as error:
            self.works = False
            torch.cuda.set_stream(now)  # PyTorch stays on the other one after an error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"CUDA graphs are off from here on, and small batches are slower: {reason}", stacklevel=3)
            return None

        def replay(*inputs):
            fill(inputs)
            graph.replay()
            return result.clone()  # the next graph works in the same memory

        return replay
