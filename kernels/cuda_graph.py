"""A training step as CUDA graphs: fixed inputs, streams, capture, and the proof that a replay equals an eager step.

    graph = StepGraph([(forward, False), (exchange, True), (backward, False)], moving, moments)
    inputs = Inputs(plan, device)           # plan: a list of dicts of tensors; forward and backward read inputs.plan
    inputs.put(next_plan)                   # one copy to the device, for which the host does not wait
    graph.step()                            # eager at first, then captured, proven and replayed

An eager step launches some thousand kernels, each of which takes the host longer than the GPU. A graph launches all of
them at once, but it is blind: it reads and writes the very addresses that it was recorded with, and whatever Python
decided while it was recorded stays decided. So all that changes from step to step must come through Inputs, and a graph
is kept only if a replay moves a network as an eager step does from the same state.

A step is a list of parts (function, on_host). The functions take nothing and return nothing; they keep what the next
part needs in attributes of their owner, where a replay finds the tensors of the recording. Neighbouring parts that are
not on the host make one graph; those on the host, such as an exchange between processes, run between two graphs.
"""
import contextlib
import itertools
import math

import torch

WARM_UP = 3     # eager steps before a capture: cuDNN, cuBLAS, Triton and Adam make what they need at their first call
PROOF = 1e-2    # of the largest gradient of a network: roundings stay far below it, what went stale lies far above
STAGES = 4      # pinned buffers in turn, so that the host may be some steps ahead of the GPU


class StepGraph:
    """Runs a step eagerly WARM_UP times, captures it, proves the capture and replays it; or stays eager and says why.

    parts: [(function, on_host), ...], see above. moving(): every tensor that a step changes; moments(): tensors that
    show what a step did, such as the first moments of Adam. obstacle(): why the step cannot be captured, or None.
    first(value) and largest(number) are over all processes, which capture together or not at all: first gives the first
    value that is not None. refused(why) is told once that steps stay eager, and may raise. explain(error) -> words.
    """

    def __init__(self, parts, moving, moments, obstacle=lambda: None, refused=lambda why: None,
                 first=lambda value: value, largest=lambda number: number, explain=repr, cuda=True):
        self.parts, self.moving, self.moments, self.obstacle = parts, moving, moments, obstacle
        self.refused, self.first, self.largest, self.explain = refused, first, largest, explain
        self.lanes = Lanes(cuda)
        self.graphs, self.replays = None, None      # the CUDA graphs; what to call in turn to replay a step
        self.key = None                             # what the graphs were captured for
        self.warm = 0                               # eager steps so far
        self.why = None                             # why steps stay eager, once that is decided
        self.capturing = False
        if why := obstacle():
            self.go_without(why)

    def step(self, key=None):
        """One step. key: whatever decides which kernels it launches; if it has changed, the step is captured anew."""
        if self.warming:
            self.lanes.run(self.eager)              # as it will be captured
            self.warm += 1
            return
        if not self.why and (self.replays is None or self.key != key):
            self.capture(key)
        if self.replays is not None:
            self.replay()
        else:
            self.eager()

    @property
    def warming(self):
        return self.replays is None and not self.why and self.warm < WARM_UP

    def eager(self):
        for part, _ in self.parts:
            part()

    def replay(self):
        for part in self.replays:
            part()

    def capture(self, key=None):
        """Record the step, and keep the recording only if a replay does what an eager step does from the same state.

        Of moving() nothing has moved afterwards. Call it after an eager step at least.
        """
        self.drop()
        self.key = key
        why = self.first(self.obstacle())
        if why is None:
            before = [t.detach().clone() for t in self.moving()]    # a clone with its graph holds the default stream
            expected = self.tried(self.eager, before)       # first, so that its memory is free for the graph
            why = self.first(self.record_parts())
        if why is None:
            found = self.tried(self.replay, before)
            worst = self.largest(max(map(difference, expected, found), default=0))
            if worst > PROOF:
                why = f"a replay differed from an eager step by {worst:.1g} of the largest gradient"
        if why is not None:
            self.drop()
            self.go_without(why)

    def record_parts(self):
        """Fill graphs and replays. Returns None, or the words that say why it failed."""
        graphs, replays = [], []
        self.capturing = True
        try:
            with self.lanes.forking():
                for on_host, parts in itertools.groupby(self.parts, key=lambda part: part[1]):
                    functions = [function for function, _ in parts]
                    if on_host:
                        replays += functions
                        continue
                    # One pool for all: what a graph leaves to the next stays where it is.
                    pool = graphs[-1].pool() if graphs else None
                    graphs.append(record(functions, pool, self.lanes.main))
                    replays.append(graphs[-1].replay)
        except Exception as e:
            cause = e.__context__ or e      # the end of a failed capture fails, too, and hides the reason
            return f"capturing it failed: {self.explain(cause).partition(' Search for `cuda')[0][:200]}"
        finally:
            self.capturing = False
        self.graphs, self.replays = graphs, replays
        return None

    def tried(self, run, before):
        """moments() after run(); then all that moved is put back as it is in `before`."""
        run()
        moments = [t.clone() for t in self.moments()]
        with torch.no_grad():
            for t, old in zip(self.moving(), before):
                t.copy_(old)
        return moments

    def drop(self):
        """Forget the graphs, as after a change of the tensors that they move; after some eager steps come new ones."""
        self.graphs = self.replays = None
        self.warm = 0

    def go_without(self, why):
        self.why = why
        self.refused(why)


def difference(a, b):
    """Largest difference as a share of the largest magnitude in a; infinite where a number is lost."""
    share = ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
    return math.inf if math.isnan(share) else share


def record(functions, pool, stream):
    """Capture what the functions launch -> graph. Nothing runs until graph.replay()."""
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    # The outer context, because torch.cuda.graph leaves its stream the current one when a capture fails.
    # thread_local, because NCCL's watchdog asks for events in a thread of its own, which "global" forbids.
    capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    try:
        with torch.cuda.stream(stream), capturing:
            for function in functions:
                function()
    except BaseException:
        # torch leaves its allocator capturing, which then frees nothing any more.
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise
    return graph


class Lanes:
    """Streams for networks that do not wait for one another: their small kernels then share the GPU.

    with lanes(name): what is launched inside runs in a stream of its own, which begins where the current stream stands
    and after the lanes named in `after`. join() waits for all of them; nothing made in one lane and used in another may
    be freed before. Outside run() and forking(), and without a GPU, there is one lane: one thing follows the other.
    """

    def __init__(self, cuda=True):
        self.main = torch.cuda.Stream() if cuda else None
        self.streams, self.forked, self.on = {}, [], False

    def __call__(self, name, after=()):
        if not self.on:
            return contextlib.nullcontext()
        if name not in self.streams:                # kept: torch has 32 streams, and goes through them in turn
            self.streams[name] = torch.cuda.Stream()
        stream = self.streams[name]
        self.forked.append(stream)
        stream.wait_stream(torch.cuda.current_stream())
        for other in after:
            stream.wait_stream(self.streams[other])
        return torch.cuda.stream(stream)

    def join(self):
        for stream in dict.fromkeys(self.forked):   # one that was not begun in this capture may not be waited for
            torch.cuda.current_stream().wait_stream(stream)
        self.forked.clear()

    @contextlib.contextmanager
    def forking(self):
        self.on = self.main is not None
        try:
            yield
        finally:
            self.on = False
            self.forked.clear()

    def run(self, work):
        """work() on the main stream, where it will be captured: cuBLAS makes its workspaces per stream."""
        if self.main is None:
            return work()
        outside = torch.cuda.current_stream()
        self.main.wait_stream(outside)
        with torch.cuda.stream(self.main), self.forking():
            work()
        outside.wait_stream(self.main)


class Inputs:
    """What a step reads from outside, at fixed places on the device: a captured step finds new numbers at old places.

    plan: a list of dicts of CPU tensors; the attribute `plan` holds the places. put() packs the next values, of the
    same shapes and types, and sends them in one copy.
    """

    def __init__(self, plan, device):
        names = [(n, key) for n, values in enumerate(plan) for key in values]
        names.sort(key=lambda name: -plan[name[0]][name[1]].element_size())        # so that every view is aligned
        self.slots, size = [], 0
        for n, key in names:
            t = plan[n][key]
            self.slots.append((n, key, slice(size, size + t.nbytes), t.dtype, t.shape))
            size += t.nbytes
        cuda = device.type == "cuda"
        self.packed = torch.empty(size, dtype=torch.uint8, device=device)
        self.hosts, self.sent = [self.packed], []
        if cuda:
            self.hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(STAGES)]
            self.sent = [torch.cuda.Event() for _ in self.hosts]
        self.plan = self.views(self.packed, len(plan))
        self.staging = [self.views(host, len(plan)) for host in self.hosts]
        self.turn = 0
        self.put(plan)

    def views(self, packed, n):
        plan = [{} for _ in range(n)]
        for n, key, place, dtype, shape in self.slots:
            plan[n][key] = packed[place].view(dtype).view(shape)
        return plan

    def put(self, plan):
        """Send the next values; ValueError where they have not the names, shapes and types of the first."""
        k = self.turn = (self.turn + 1) % len(self.hosts)
        if self.sent:
            self.sent[k].synchronize()              # its last copy, STAGES steps ago, still reads that memory
        for places, values in zip(self.staging[k], plan, strict=True):
            if places.keys() != values.keys():
                raise ValueError(f"the inputs {list(values)} are not {list(places)}, those that there are places for")
            for key, value in values.items():
                if (value.shape, value.dtype) != (places[key].shape, places[key].dtype):
                    raise ValueError(f"input {key!r} is {value.dtype} {tuple(value.shape)}; its place is "
                                     f"{places[key].dtype} {tuple(places[key].shape)}")
                places[key].copy_(value)
        if self.sent:
            self.packed.copy_(self.hosts[k], non_blocking=True)
            self.sent[k].record()
