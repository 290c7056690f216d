"""Threads in every corner of a process's life, and as many of them as the user and the machine allow.

Oracles: threadpoolctl, of how many threads BLAS has; the threads that tasks say they ran on.
"""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import funcmha
from funcmha import attention, attention_vjp, init, mha
from funcmha.engines.plan import Plan
from funcmha.engines.tiled import blas, quota, threads

PLAN = Plan()
PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from funcmha import init, mha
from funcmha.engines.plan import Plan
from funcmha.engines.tiled import threads
from threadpoolctl import threadpool_info, threadpool_limits
params, x = init(0, 128, 4), np.ones((4, 300, 128), np.float32)

def blas():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}

def parallel():
    "On how many threads four tasks run, each of which waits a while for another one."
    used, two = set(), threading.Barrier(2)
    def work(_):
        used.add(threading.get_ident())
        try:
            two.wait(5 if len(used) < 2 else 0.01)
        except threading.BrokenBarrierError:
            pass
    threads.run(work, range(4), 1e9, Plan())
    return len(used)

"""


def run(code, timeout=120, warn=(), **env):
    """What a process of its own prints; its exit status must be 0, and nothing must be on its stderr."""
    unset = dict.fromkeys(("FUNCMHA_NUM_THREADS", *threads.VARIABLES))
    env = dict(os.environ) | unset | {"FUNCMHA_NUM_THREADS": "2"} | env
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, *warn, "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split()


def tasks_and_threads(n=4):
    """The threads that n tasks run on, of which the first two wait for each other, for a second at most."""
    used, two = set(), threading.Barrier(2)

    def work(_):
        used.add(threading.get_ident())
        with suppress(threading.BrokenBarrierError):
            two.wait(1 if len(used) < 2 else 0.01)

    threads.run(work, range(n), flops=1e9, plan=PLAN)
    return len(used)


# ── from the first thread to the last ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", ["", "mha(params, x, x, x)"], ids=["first call", "later call"])
def test_a_thread_that_outlives_main_is_served(before):
    out = run(f"""
        {before}
        def train():
            threading.main_thread().join()
            mha(params, x, x, x)
            print("trained")
        threading.Thread(target=train).start()
    """)
    assert out == ["trained"]


@pytest.mark.parametrize("before", ["", "mha(params, x, x, x)"], ids=["first call", "later call"])
def test_a_function_of_atexit_is_served(before):
    out = run(f"""
        import atexit
        {before}
        atexit.register(lambda: (mha(params, x, x, x), print("done")))
    """)
    assert out == ["done"]


def test_threads_that_were_there_still_help_after_main():
    out = run("""
        import atexit
        assert parallel() == 2
        def outlive():
            threading.main_thread().join()
            print(parallel())
        threading.Thread(target=outlive).start()
        atexit.register(lambda: print(parallel()))
    """)
    assert out == ["2", "2"]


def test_what_is_collected_last_is_served():
    """When nothing can be imported any more, and no other thread runs."""
    out = run("""
        class Last:
            def __init__(self): self.call = lambda m=mha, p=params, x=x: m(p, x, x, x)
            def __del__(self, print=print): self.call(); print("deleted")
        last = Last()
        last.call()
    """)
    assert out == ["deleted"]


def test_a_daemon_in_a_call_does_not_keep_the_process():
    run("""
        def busy():
            while True: mha(params, x, x, x)
        threading.Thread(target=busy, daemon=True).start()
        time.sleep(0.2)
    """)


def test_without_a_thread_to_be_had_the_caller_does_it_all(monkeypatch):
    """As at the limit of processes, and as Python 3.12 answers when it ends."""

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "7")
    monkeypatch.setattr(threads, "_workers", 0)
    monkeypatch.setattr(threads, "_jobs", threads.SimpleQueue())
    monkeypatch.setattr(threading.Thread, "start", start)
    done = []
    threads.run(done.append, range(5), flops=1e9, plan=PLAN)
    assert done == [0, 1, 2, 3, 4]


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────

FORKING = ("-W", "ignore::DeprecationWarning")  # of forking with threads, which is what is tried
no_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@no_fork
def test_a_child_forked_during_a_call_has_the_blas_of_the_user():
    """Before its first call and after it; and the parent keeps its own."""
    out = run(
        """
        stop = threading.Event()
        def busy():
            while not stop.is_set(): mha(params, x, x, x)
        threadpool_limits(3, "blas")
        t = threading.Thread(target=busy); t.start(); time.sleep(0.2)
        for i in range(8):
            if not (pid := os.fork()):
                found = blas()
                mha(params, x, x, x)
                print(*sorted(found | blas()), parallel(), flush=True)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set(); t.join()
        print(*blas())
        """,
        warn=FORKING,
    )
    assert out == 8 * ["3", "2"] + ["3"]


@no_fork
def test_a_child_forked_within_a_hold_has_the_blas_of_the_user():
    """And of what the parent's thread was in the middle of, the child is not."""
    out = run(
        """
        threadpool_limits(3, "blas")
        with threads.single_threaded_blas():
            print(*blas(), flush=True)
            if not (pid := os.fork()):
                print(*blas(), flush=True)
                with threads.single_threaded_blas():
                    print(*blas(), flush=True)
                print(*blas(), flush=True)
            else:
                assert os.waitpid(pid, 0)[1] == 0
                print(*blas(), flush=True)
        print(*blas(), flush=True)
        """,
        warn=FORKING,
    )
    assert out == [*"1313", "3", *"13"]


@no_fork
def test_a_call_that_is_forked_in_its_middle_ends():
    """In the child it has lost tasks, or has not. The parent has lost nothing, and both may call again."""
    out = run(
        """
        pids = []
        def fork(*_):
            pids.append(os.fork())
            if not pids[-1]: mha(params, x, x, x)
        signal.signal(signal.SIGALRM, fork)
        def work(i):
            signal.setitimer(signal.ITIMER_REAL, 0.05) if i == 0 else None
            time.sleep(0.2)
        try:
            threads.run(work, range(4), 1e9, Plan())
            end = "whole"
        except RuntimeError as error:
            end = str(error)
        mha(params, x, x, x)
        assert parallel() == 2
        if not pids[-1]:
            print(end.split()[0], flush=True)
        else:
            assert os.waitpid(pids[-1], 0)[1] == 0
            print(end)
        """,
        warn=FORKING,
    )
    assert out == ["forked", "whole"]


# ── one call in the middle of another ────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_a_call_in_a_signal_handler_changes_no_bit_of_the_other():
    """It begins between any two steps of the other, on the same thread, whose scratch arrays are in use."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 2, 700, 16), dtype=np.float32)
    small, inner = q[:, :, :300], []

    def call(q, k):
        o, cache = attention(q, k, k, engine="tiled")
        return [o, *attention_vjp(cache, o)[:3]]

    want, want_small = call(q, k), call(small, small)
    before = signal.signal(signal.SIGALRM, lambda *_: inner.append(call(small, small)))
    try:
        for i in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (i + 1))
            got = call(q, k)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert all(map(np.array_equal, got, want))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert inner
    assert all(np.array_equal(a, b) for got in inner for a, b in zip(got, want_small, strict=True))


def test_scratch_of_a_call_within_a_call_is_another():
    arrays = []

    def task(depth):
        arrays.append(threads.scratch("a", (3, 5), np.float32))
        if depth:
            threads.run(task, [depth - 1], flops=0, plan=PLAN)
            assert np.shares_memory(arrays[-2], threads.scratch("a", (3, 5), np.float32))

    threads.run(task, [1], flops=0, plan=PLAN)
    assert not np.shares_memory(*arrays)


def test_a_task_may_have_tasks_of_its_own(monkeypatch):
    """All threads of the pool may be waiting for what they have handed out."""
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "3")
    done = []

    def work(i):
        threads.run(lambda j: done.append((i, j)), range(5), flops=1e9, plan=PLAN)

    threads.run(work, range(7), flops=1e9, plan=PLAN)
    assert sorted(done) == [(i, j) for i in range(7) for j in range(5)]


def test_a_call_does_not_wait_for_threads_that_work_for_others(monkeypatch):
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "_workers", 0)
    monkeypatch.setattr(threads, "_jobs", threads.SimpleQueue())
    begun, go, done = threading.Barrier(3), threading.Event(), []

    def blocking(_):
        begun.wait(10)
        go.wait(10)

    other = threading.Thread(target=lambda: threads.run(blocking, range(2), flops=1e9, plan=PLAN))
    other.start()
    begun.wait(10)  # the pool's only thread is taken
    array = np.arange(5)
    kept = weakref.ref(array)
    threads.run(lambda i, a=array: done.append(a[i]), range(5), flops=1e9, plan=PLAN)
    assert done == [0, 1, 2, 3, 4]
    del array
    gc.collect()
    assert kept() is None  # though what was handed out is still in the queue
    go.set()
    other.join(10)


def test_what_was_handed_out_is_not_kept(monkeypatch):
    """By the thread that did it, while it waits for more."""
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "2")
    for seconds in (0.0, 0.05):
        array = np.ones(3)
        kept = weakref.ref(array)
        threads.run(lambda _, a=array, s=seconds: (a.sum(), time.sleep(s)), range(2), flops=1e9, plan=PLAN)
        del array
        deadline = time.monotonic() + 5
        while gc.collect() >= 0 and kept() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert kept() is None


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer here")
def test_an_interrupted_caller_waits_for_tasks_that_have_begun(monkeypatch):
    """It has nothing left to do but to wait for the other thread, and is interrupted there."""
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "2")
    caller, both, done = threading.get_ident(), threading.Barrier(2), []

    def work(i):
        both.wait(10)
        if threading.get_ident() != caller:
            time.sleep(0.5)
            done.append(i)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            threads.run(work, range(2), flops=1e9, plan=PLAN)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(done) == 1


# ── limits that the user has set ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("names", [*((name,) for name in threads.VARIABLES), threads.VARIABLES], ids="+".join)
def test_a_variable_that_says_one_thread_is_heard(names):
    """As joblib sets them in its workers, each of which would have had a thread for each core of the machine."""
    one = dict.fromkeys(names, "1")
    out = run("mha(params, x, x, x); print(threading.active_count(), threads.num_threads())",
              FUNCMHA_NUM_THREADS=None, **one)  # fmt: skip
    assert out == ["1", "1"]


@pytest.mark.parametrize(
    ("value", "n"), [("1", 1), (" 1 ", 1), ("1,4", 1), ("0", 64), ("two", 64), ("", 64), ("-1", 64)]
)
def test_of_variables_what_is_a_number_counts(clean, value, n):
    clean.setenv("OMP_NUM_THREADS", value)
    with threadpool_limits(64, "blas"):
        assert threads.num_threads() == n


@pytest.fixture
def clean(monkeypatch):
    """No limit but BLAS's: 99 cores, no quota, no variable."""
    for name in ("FUNCMHA_NUM_THREADS", *threads.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99), raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: float("inf"))
    monkeypatch.setattr(threads, "_quota", (-1.0, 0.0))
    return monkeypatch


def test_what_threadpoolctl_leaves_to_blas_is_heard(clean):
    for n in (1, 2, 3):
        with threadpool_limits(n, "blas"):
            assert threads.num_threads() == n
            with threads.single_threaded_blas():  # which is no limit of the user's
                assert threads.num_threads() == n
                with threads.single_threaded_blas():
                    assert threads.num_threads() == n
                assert threads.num_threads() == n


def test_one_thread_of_blas_is_one_thread_of_a_call(clean):
    """Also when the pool has threads from before."""
    with threadpool_limits(2, "blas"):
        assert tasks_and_threads() == 2
    with threadpool_limits(1, "blas"):
        assert tasks_and_threads() == 1


def test_a_call_hears_the_limit_while_another_thread_holds_blas(clean):
    held, go = threading.Event(), threading.Event()

    def hold():
        with threads.single_threaded_blas():
            held.set()
            go.wait(10)

    with threadpool_limits(3, "blas"):
        other = threading.Thread(target=hold)
        other.start()
        held.wait(10)
        assert numpys() == {1}
        assert threads.num_threads() == 3
        with threads.single_threaded_blas():
            assert threads.num_threads() == 3
        go.set()
        other.join(10)
        assert numpys() == {3}


def numpys():
    """The threads of NumPy's BLAS: other tests may have loaded libraries with one of their own."""
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {library["num_threads"] for library in libraries if "scipy.libs" not in library["filepath"]}


@pytest.mark.parametrize("again", [False, True])
def test_a_limit_set_while_blas_is_held_is_kept(clean, again):
    """Whether a call begins meanwhile on another thread, and hears of it, or none."""

    def call():
        with threads.single_threaded_blas():
            return numpys(), threads.num_threads()

    with threadpool_limits(4, "blas"), ThreadPoolExecutor(1) as other:
        with threads.single_threaded_blas():
            threadpool_limits(3, "blas")
            if again:
                assert other.submit(call).result() == ({1}, 3)
        assert numpys() == {3}


def test_a_call_within_a_call_holds_blas_once(clean):
    with threadpool_limits(4, "blas"):
        with threads.single_threaded_blas():
            with threads.single_threaded_blas():
                assert numpys() == {1}
            assert numpys() == {1}
        assert numpys() == {4}


def test_the_variable_of_funcmha_is_above_all_others(clean):
    clean.setenv("FUNCMHA_NUM_THREADS", "5")
    clean.setenv("OMP_NUM_THREADS", "1")
    with threadpool_limits(1, "blas"):
        assert threads.num_threads() == 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_cores_of_the_thread_are_heard():
    out = run("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(threads.num_threads())",
              FUNCMHA_NUM_THREADS=None)  # fmt: skip
    assert out == ["1"]


def test_without_a_blas_to_ask_the_variables_count(clean):
    libraries = blas._libraries()
    clean.setattr(libraries, "shared", [])
    clean.setattr(libraries, "ones", [])
    clean.setattr(libraries, "counts", [])
    assert threads.num_threads() == 99
    clean.setenv("VECLIB_MAXIMUM_THREADS", "7")
    assert threads.num_threads() == 7


class PerThread:
    """OpenBLAS on OpenMP: each thread has a number of its own, 8 at first."""

    def __init__(self):
        self.here = threading.local()

    def get_num_threads(self):
        return getattr(self.here, "n", 8)

    def set_num_threads(self, n):
        self.here.n = n


def test_a_blas_with_a_number_for_each_thread_is_held_in_each(clean):
    """And put back in each by the call that held it there, in whatever order they end."""
    library, numbers = PerThread(), {}
    libraries = blas._libraries()
    clean.setattr(libraries, "each", [library])
    clean.setattr(libraries, "counts", [False] * len(libraries.shared) + [True])
    clean.setattr(threads, "_workers", 0)
    clean.setattr(threads, "_jobs", threads.SimpleQueue())
    two, first = threading.Barrier(2), threading.Event()

    def call(name, n):
        library.set_num_threads(n)
        with threads.single_threaded_blas():
            numbers[name] = [library.get_num_threads(), threads.num_threads()]
            two.wait(10)
            if name == "b":
                first.wait(10)
        numbers[name].append(library.get_num_threads())
        first.set()

    callers = [threading.Thread(target=call, args=args) for args in (("a", 5), ("b", 3))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(10)
    assert numbers == {"a": [1, 5, 5], "b": [1, 3, 3]}
    found = set()
    threads.run(lambda _: (found.add(library.get_num_threads()), time.sleep(0.05)), range(4), flops=1e9, plan=PLAN)
    assert found == {8, 1}  # outside of a hold the caller keeps its own; a thread of the pool has one


# ── the container's quota ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def groups(tmp_path):
    """Write files of control groups, and read the quota that they say."""

    def quota_of(own, files):
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)
        return quota.cpu_quota(str(tmp_path / "own"), str(tmp_path / "fs"))

    return quota_of


NONE = float("inf")
QUOTAS = {
    "v2, in a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "v2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, NONE),
    "v2, the root of the host": ("0::/\n", {}, NONE),
    "v2, a service": ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "50000 100000\n"}, 0.5),
    "v2, the slice above it": (
        "0::/a.slice/b.service\n",
        {"a.slice/b.service/cpu.max": "max 100000\n", "a.slice/cpu.max": "300000 100000\n"},
        3,
    ),
    "v2, the least of all": ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "20000 10000\n"}, 2),
    "v2, mounted as the root": ("0::/docker/0123\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2 beside v1": ("1:name=systemd:/\n0::/a\n", {"unified/a/cpu.max": "200000 100000\n"}, 2),
    "v1": (
        "4:cpu,cpuacct:/docker/0123\n0::/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "v1, cpu alone": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "10000\n", "cpu/cpu.cfs_period_us": "5000\n"}, 2),
    "v1, no limit": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, NONE),
    "v1, another controller": (
        "1:cpuset:/\n",
        {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"},
        NONE,
    ),
    "no numbers": ("0::/\n", {"cpu.max": "many of them\n"}, NONE),
    "a period of 0": ("0::/\n", {"cpu.max": "100000 0\n"}, NONE),
    "a colon in the name": ("0::/a:b\n", {"a:b/cpu.max": "100000 100000\n"}, 1),
}


@pytest.mark.parametrize(("own", "files", "want"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_is_read(groups, own, files, want):
    assert groups(own, files) == want


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert quota.cpu_quota(str(tmp_path / "none"), str(tmp_path)) == NONE


@pytest.mark.parametrize(("cpus", "n"), [(0.1, 1), (1.0, 1), (1.5, 2), (2.0, 2), (63.2, 64), (98.1, 99), (200.0, 99)])
def test_the_quota_is_heard_rounded_up(clean, cpus, n):
    clean.setattr(threads, "cpu_quota", lambda: cpus)
    with threadpool_limits(1, "blas"):
        assert threads.num_threads() == 1
    clean.setattr(blas, "limit", lambda: 1000)
    assert threads.num_threads() == n


def test_the_quota_is_read_again_after_a_while(clean):
    asked, now = [], [100.0]
    clean.setattr(threads, "cpu_quota", lambda: asked.append(1) or float(len(asked)))
    clean.setattr(time, "monotonic", lambda: now[0])
    clean.setattr(blas, "limit", lambda: 1000)
    assert [threads.num_threads() for _ in range(3)] == [1, 1, 1]
    now[0] += threads.SECONDS + 0.1
    assert threads.num_threads() == 2


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────


def test_holding_blas_and_counting_threads_takes_microseconds():
    """Measured: 7 and 9 of this thread's time. Ten times that is too much, and more than a busy machine adds."""

    def once():
        begin = time.thread_time()
        for _ in range(100):
            with threads.single_threaded_blas():
                threads.num_threads()
        return (time.thread_time() - begin) / 100

    assert min(once() for _ in range(10)) < 150e-6


def test_results_are_the_same_whatever_the_limit(clean):
    x, params = np.ones((4, 300, 64), np.float32), init(0, 64, 4)
    x += np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    results = []
    for n in (1, 2, 3):
        with threadpool_limits(n, "blas"):
            results.append(mha(params, x, x, x)[0])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_the_prelude_runs_this_funcmha():
    assert run("import funcmha; print(funcmha.__file__)") == [funcmha.__file__]
