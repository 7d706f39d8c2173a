// Tilewright's thread pool: runs a list of launches, one after the other, on all threads.
//
// `struct tw_launch` is generated from runtime/pool.py and put in front of this file.
//
// All of the hand-over is one 64-bit word, the cursor: the number of the current launch (high half)
// and how many of its chunks are still to be taken (low half). A thread takes chunks by exchanging
// it for a smaller one, so what it gets always names the launch it belongs to. Whoever finishes the
// last chunk of a launch publishes the next one: there is no barrier that all threads must reach,
// and a thread which the system has put aside while it holds no chunk delays nobody. Launches of
// one chunk are run on the spot by the publisher.
//
// Of a guided launch a thread takes a part of its share of what is left, so that it walks a long
// stretch of memory first and threads even out at the end.

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>

#include <atomic>

namespace {

using Body = void (*)(const void*, int64_t, int64_t);

constexpr uint64_t kIdle = 1u << 31;    // no job is running
constexpr uint64_t kGuided = 1u << 30;  // the current launch is guided
constexpr int64_t kMaxChunks = kGuided - 1;
constexpr int64_t kShares = 1;          // a thread takes its share of what is left in so many parts
constexpr int kMaxThreads = 4096;
constexpr int kClockEvery = 32;         // pauses between two looks at the clock
constexpr int64_t kYieldAfterNs = 20000;

uint32_t launch_of(uint64_t cursor) { return static_cast<uint32_t>(cursor >> 32); }
int64_t chunks_left(uint64_t cursor) { return static_cast<int64_t>(cursor & (kGuided - 1)); }

struct Current {  // the launch being handed out: written between launches, by the publisher only
  Body body;
  const void* params;
  int64_t units, grain, chunks;
  const tw_launch* next;
  const tw_launch* end;
  uint32_t number;
};

struct Sleepers {  // threads waiting for the cursor to move
  pthread_mutex_t mutex;
  pthread_cond_t moved;
  std::atomic<int> count;
};

struct Pool {
  alignas(64) std::atomic<uint64_t> cursor;
  alignas(64) std::atomic<int64_t> pending;  // chunks of the current launch not yet finished
  alignas(64) Current current;
  alignas(64) Sleepers workers;
  alignas(64) Sleepers caller;
  alignas(64) pthread_mutex_t job;  // held for the length of a job
  pthread_t threads[kMaxThreads];
  int started;                      // workers running; the caller is one thread more
  int wanted;                       // threads in all
  std::atomic<bool> stop;
  bool fork_handler;
  std::atomic<int64_t> spin_ns;
  std::atomic<int64_t> yield_after_ns;
};

Pool pool;
thread_local bool inside = false;  // this thread is running a job's bodies

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

bool is_small(const tw_launch& launch) { return launch.units <= launch.grain; }

void run_alone(const tw_launch& launch) {
  if (launch.units > 0) reinterpret_cast<Body>(launch.body)(launch.params, 0, launch.units);
}

// Wakes up to `wanted` of the sleepers. The caller has just stored the cursor (seq_cst), a sleeper
// counts itself (seq_cst) before its last look at the cursor: one of the two sees the other.
void wake(Sleepers& sleepers, int64_t wanted) {
  int asleep = sleepers.count.load(std::memory_order_seq_cst);
  if (asleep == 0 || wanted <= 0) return;
  pthread_mutex_lock(&sleepers.mutex);
  if (wanted >= asleep) {
    pthread_cond_broadcast(&sleepers.moved);
  } else {
    for (int64_t i = 0; i < wanted; ++i) pthread_cond_signal(&sleepers.moved);
  }
  pthread_mutex_unlock(&sleepers.mutex);
}

// Moves the cursor to the next launch, or to idle when `chunks` is 0. Nothing of `current` may be
// touched afterwards: the job may be over, and another one begun.
void publish(int64_t chunks, bool guided = false) {
  uint64_t number = ++pool.current.number;
  uint64_t low = chunks ? static_cast<uint64_t>(chunks) | (guided ? kGuided : 0) : kIdle;
  pool.cursor.store(number << 32 | low, std::memory_order_seq_cst);
  if (chunks) wake(pool.workers, chunks - 1);
  wake(pool.caller, 1);
}

// Runs small launches and publishes the first large one, or the end of the job.
void advance() {
  Current& now = pool.current;
  while (now.next != now.end) {
    const tw_launch& launch = *now.next++;
    if (is_small(launch)) {
      run_alone(launch);
      continue;
    }
    int64_t grain = launch.grain < 1 ? 1 : launch.grain;
    int64_t coarsest = launch.units / kMaxChunks + 1;
    if (grain < coarsest) grain = coarsest;
    now.body = reinterpret_cast<Body>(launch.body);
    now.params = launch.params;
    now.units = launch.units;
    now.grain = grain;
    now.chunks = (launch.units - 1) / grain + 1;
    pool.pending.store(now.chunks, std::memory_order_relaxed);
    publish(now.chunks, launch.guided != 0);
    return;
  }
  publish(0);
}

// How many chunks a thread takes at once; at least one of those left.
int64_t portion(uint64_t cursor) {
  int64_t part = cursor & kGuided ? chunks_left(cursor) / (kShares * pool.wanted) : 1;
  return part > 1 ? part : 1;
}

// Takes chunks while there are any; returns a cursor without chunks to take.
uint64_t work() {
  for (;;) {
    uint64_t seen = pool.cursor.load(std::memory_order_acquire);
    int64_t mine = 0;  // chunks done of one launch: it cannot end before they are reported
    while (chunks_left(seen) > 0) {
      int64_t taken = portion(seen);
      if (!pool.cursor.compare_exchange_weak(seen, seen - static_cast<uint64_t>(taken),
                                             std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      const Current& now = pool.current;
      int64_t begin = (now.chunks - chunks_left(seen)) * now.grain;
      int64_t rest = now.units - begin, size = taken * now.grain;
      now.body(now.params, begin, begin + (rest < size ? rest : size));
      mine += taken;
      seen = pool.cursor.load(std::memory_order_acquire);
    }
    if (mine == 0) return seen;
    if (pool.pending.fetch_sub(mine, std::memory_order_acq_rel) == mine) advance();
  }
}

void sleep_until_moved(uint64_t seen, Sleepers& sleepers) {
  pthread_mutex_lock(&sleepers.mutex);
  sleepers.count.fetch_add(1, std::memory_order_seq_cst);
  while (launch_of(pool.cursor.load(std::memory_order_seq_cst)) == launch_of(seen)) {
    pthread_cond_wait(&sleepers.moved, &sleepers.mutex);
  }
  sleepers.count.fetch_sub(1, std::memory_order_seq_cst);
  pthread_mutex_unlock(&sleepers.mutex);
}

// Waits for another launch than `seen`: spins, then lets others run, then sleeps.
void wait_until_moved(uint64_t seen, Sleepers& sleepers) {
  int64_t spin = pool.spin_ns.load(std::memory_order_relaxed);
  int64_t yield_after = pool.yield_after_ns.load(std::memory_order_relaxed);
  int64_t began = now_ns();
  for (int64_t waited = 0; waited < spin; waited = now_ns() - began) {
    for (int i = 0; i < kClockEvery; ++i) {
      uint64_t cursor = pool.cursor.load(std::memory_order_acquire);
      if (launch_of(cursor) != launch_of(seen)) return;
      pause();
    }
    if (waited >= yield_after) sched_yield();
  }
  sleep_until_moved(seen, sleepers);
}

void* worker(void*) {
  inside = true;
  while (!pool.stop.load(std::memory_order_acquire)) {
    uint64_t seen = work();
    if (pool.stop.load(std::memory_order_acquire)) break;
    wait_until_moved(seen, pool.workers);
  }
  return nullptr;
}

void reset(Sleepers& sleepers) {
  pthread_mutex_init(&sleepers.mutex, nullptr);
  pthread_cond_init(&sleepers.moved, nullptr);
  sleepers.count.store(0, std::memory_order_relaxed);
}

// The pool without workers: at the start, and in a forked child, which has none of its parent's.
void reset_pool() {
  pthread_mutex_init(&pool.job, nullptr);
  reset(pool.workers);
  reset(pool.caller);
  pool.started = 0;
  pool.stop.store(false, std::memory_order_relaxed);
  pool.cursor.store(kIdle, std::memory_order_relaxed);
  inside = false;
}

void start_workers() {
  if (!pool.fork_handler) {
    pthread_atfork(nullptr, nullptr, reset_pool);
    pool.fork_handler = true;
  }
  sigset_t all, before;  // signals belong to the program's own threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.started < pool.wanted - 1) {
    if (pthread_create(&pool.threads[pool.started], nullptr, worker, nullptr) != 0) {
      pool.wanted = pool.started + 1;  // the system gives no more: go on with what there is
      break;
    }
    ++pool.started;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void stop_workers() {
  pool.stop.store(true, std::memory_order_release);
  publish(0);
  wake(pool.workers, kMaxThreads);
  for (int i = 0; i < pool.started; ++i) pthread_join(pool.threads[i], nullptr);
  pool.started = 0;
  pool.stop.store(false, std::memory_order_release);
}

struct Initialise {
  Initialise() { reset_pool(); pool.wanted = 1; }
} initialise;

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

// Threads in all, the caller's included; how long idle threads spin before they sleep; whether
// there are fewer cores than threads. Running workers are replaced; new ones start when needed.
TW_EXPORT void tw_pool_configure(int64_t threads, int64_t spin_ns, int64_t crowded) {
  pthread_mutex_lock(&pool.job);
  if (pool.started) stop_workers();
  pool.wanted = static_cast<int>(threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads);
  pool.spin_ns.store(spin_ns, std::memory_order_relaxed);
  pool.yield_after_ns.store(crowded ? 0 : kYieldAfterNs, std::memory_order_relaxed);
  pthread_mutex_unlock(&pool.job);
}

TW_EXPORT int64_t tw_pool_threads() {
  pthread_mutex_lock(&pool.job);
  int64_t threads = pool.wanted;
  pthread_mutex_unlock(&pool.job);
  return threads;
}

// Runs `n` launches in order and returns when the last is done. Several threads may call at once:
// their jobs take turns. A body that calls it gets its launches run on its own thread.
TW_EXPORT void tw_pool_run(const tw_launch* launches, int64_t n) {
  const tw_launch* end = launches + n;
  while (launches != end && (is_small(*launches) || inside)) run_alone(*launches++);
  if (launches == end) return;
  pthread_mutex_lock(&pool.job);
  if (pool.started < pool.wanted - 1) start_workers();
  inside = true;
  if (pool.wanted == 1) {
    while (launches != end) run_alone(*launches++);
  } else {
    pool.current.next = launches;
    pool.current.end = end;
    advance();
    for (;;) {
      uint64_t seen = work();
      if (seen & kIdle) break;
      wait_until_moved(seen, pool.caller);
    }
  }
  inside = false;
  pthread_mutex_unlock(&pool.job);
}
