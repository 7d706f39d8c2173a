// Happens-before order of the accesses to memory of a simulated launch (warps.h): a pair of them, one a write, that
// nothing orders is a race, whatever the order was in which they ran.
//
// Who accesses memory is an *actor*: a thread; its cp.async, which end where it waits for them; the products that a
// warp has under way, and the boxes that it stores; the boxes that arrive at an mbarrier. A clock has the number of the latest event of each actor that is
// known to have happened; what synchronises joins clocks. An element of memory keeps its last write and the reads and
// atomic updates behind it, and an access is a race with those of them that its clock does not cover. Shuffles, votes
// and products of matrices order nothing. The compiler reports the accesses: -fsanitize=thread calls the functions
// below for each of them (not for those of UNWATCHED functions), of whose library nothing is linked.
//
// Proxies (sm_90): boxes and wgmma see what threads have written only behind a fence.proxy.async. So a clock has a second half,
// the events that such a fence has shown to them.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#define HERE inline __attribute__((always_inline, no_sanitize("thread")))

namespace simulated {

constexpr int MOST_THREADS = 1024, MOST_SMEM = 232448, MOST_SITES = 1024, MBARRIERS = 160, NOBODY = -1, BEFORE = -2;
enum Kind { READ, WRITE, UPDATE };

typedef int32_t Numbers __attribute__((vector_size(64), aligned(4)));
struct Event { int32_t who, when; };
struct Seen {  // events that nothing orders: a few, or one of each actor
  int32_t count;
  Event few[5];
  int32_t* all;
};
struct Cell { Event write; Seen reads; Seen* updates; };
struct Range { char* begin; int64_t bytes, unit; Cell* cells; };  // memory that a launch may write; bytes of a cell
constexpr int SHARED_UNIT = 4;  // no two threads write halves of a word of shared memory

alignas(1024) char smem[MOST_SMEM];
extern "C" char __start_tw_shared[] __attribute__((weak, visibility("hidden")));  // variables that are __shared__
extern "C" char __stop_tw_shared[] __attribute__((weak, visibility("hidden")));
Range ranges[64];
int range_count, shared_ranges;
alignas(64) char stacks[MOST_THREADS][1 << 17];

int threads, cta, grid, current;
int actors, length;        // of a CTA; numbers of a half of a clock, of all CTAs
bool foreign;              // whether a thread of this CTA knows of another CTA
int32_t* clocks;           // of this CTA's threads
int32_t own[MOST_THREADS]; // events of each thread so far: its own number in its clock
char report[400];          // what went wrong first; empty: nothing
void* scheduler;
extern "C" {
__attribute__((visibility("default"))) int dropped = -1;             // a site that is left out
__attribute__((visibility("default"))) uint8_t reached[MOST_SITES];  // whether a thread came to each site
}

UNWATCHED void stop(const char* what);  // ends the launch

HERE int base() { return cta * actors; }
HERE int copies_of(int thread) { return base() + threads + thread; }
HERE int products_of(int warp) { return base() + 2 * threads + warp; }
HERE int stores_of(int warp) { return products_of(threads / 32 + warp); }
HERE int boxes_of(int mbarrier) { return products_of(threads / 32 * 2 + mbarrier); }
HERE int before() { return base() + actors - 1; }  // the launch before this one
HERE int actor_of(Event e) { return e.who == BEFORE ? before() : e.who; }
HERE int32_t* clock_of(int thread) { return clocks + static_cast<int64_t>(thread) * 2 * length; }
HERE bool is_async(Event e) { return e.who >= 0 && e.who % actors >= 2 * threads; }

// -- clocks ----------------------------------------------------------------------------------------
UNWATCHED void join(int32_t* to, const int32_t* from) {
  const int begin = foreign ? 0 : base(), end = foreign ? length : base() + actors;
  for (int half = 0; half < 2; ++half)
    for (int i = half * length + begin; i < half * length + end; i += 16) {
      const Numbers a = *reinterpret_cast<Numbers*>(to + i), b = *reinterpret_cast<const Numbers*>(from + i);
      *reinterpret_cast<Numbers*>(to + i) = a > b ? a : b;
    }
}
UNWATCHED int32_t* new_clock() { return static_cast<int32_t*>(calloc(2 * length + 16, 4)); }
// What this thread did so far is known to whoever acquires `clock`.
UNWATCHED void release(int32_t* clock) {
  int32_t* mine = clock_of(current);
  join(clock, mine);
  mine[base() + current] = ++own[current];
}
UNWATCHED void acquire(const int32_t* clock) {
  join(clock_of(current), clock);
}
UNWATCHED void know(int actor, int32_t when) {
  int32_t& known = clock_of(current)[actor];
  known = known > when ? known : when;
}
UNWATCHED void fence_of_proxies() {
  int32_t* mine = clock_of(current);
  for (int i = foreign ? 0 : base(); i < (foreign ? length : base() + actors); ++i)
    mine[length + i] = mine[length + i] > mine[i] ? mine[length + i] : mine[i];
}

// -- accesses --------------------------------------------------------------------------------------
HERE bool covers(const int32_t* clock, Event e, bool by_async) {
  if (e.who == NOBODY) return true;
  return clock[actor_of(e)] >= e.when && (!by_async || is_async(e) || e.who == BEFORE || clock[length + e.who] >= e.when);
}
UNWATCHED void clear(Seen& s) {
  free(s.all);
  s.all = nullptr;
  s.count = 0;
}
UNWATCHED void add(Seen& s, Event e, const int32_t* clock) {
  if (!s.all) {
    int left = 0;
    for (int i = 0; i < s.count; ++i)
      if (!covers(clock, s.few[i], false)) s.few[left++] = s.few[i];
    s.count = left;
    if (left < 5) { s.few[s.count++] = e; return; }
    s.all = static_cast<int32_t*>(calloc(length, 4));
    for (int i = 0; i < s.count; ++i) s.all[actor_of(s.few[i])] = s.few[i].when;
  }
  s.all[actor_of(e)] = e.when;
}
// An event that the clock does not cover, or that of nobody.
UNWATCHED Event uncovered(const Seen& s, const int32_t* clock) {
  if (s.all) {
    for (int i = 0; i < length; ++i)
      if (s.all[i] > clock[i]) return {i, s.all[i]};
    return {NOBODY, 0};
  }
  for (int i = 0; i < s.count; ++i)
    if (!covers(clock, s.few[i], false)) return s.few[i];
  return {NOBODY, 0};
}
UNWATCHED int named(char* to, int room, Event e) {
  if (e.who == BEFORE) return snprintf(to, room, "the launch before");
  int number = e.who % actors, kind = 0;
  static const char* const kinds[] = {"thread", "copies of thread", "products of warp", "stored boxes of warp", "boxes of mbarrier"};
  for (const int counts[] = {threads, threads, threads / 32, threads / 32}; kind < 4 && number >= counts[kind]; ++kind) number -= counts[kind];
  return snprintf(to, room, "%s %d of CTA %d", kinds[kind], number, e.who / actors);
}
UNWATCHED void race(Kind kind, Event mine, Event other, const char* other_kind, const Range& range, const char* at) {
  static const char* const names[] = {"read", "write", "update"};
  char a[80], b[80], text[300];
  named(a, sizeof a, mine);
  named(b, sizeof b, other);
  snprintf(text, sizeof text, "race: a %s by %s and a %s by %s, %s + %ld", names[kind], a, other_kind, b,
           &range - ranges < shared_ranges ? "shared memory" : "an array", static_cast<long>(at - range.begin));
  stop(text);
}
HERE Range* range_at(const char* at) {
  for (int i = 0; i < range_count; ++i)
    if (static_cast<uint64_t>(at - ranges[i].begin) < static_cast<uint64_t>(ranges[i].bytes)) return ranges + i;
  return nullptr;
}
// Lanes of a warp that store equal values to one place store once, which no rule forbids; threads of other warps are
// let do so where `equal_stores` says it. Such a store changes nothing. Its value comes behind its report, so it is
// compared when something else happens.
bool equal_stores;
struct Owed { const char* at; int64_t bytes; Event mine, other; Range* range; char value[16]; } owed;
UNWATCHED void settle_stores() {
  if (!owed.bytes) return;
  const int64_t bytes = owed.bytes;
  owed.bytes = 0;
  if (memcmp(owed.at, owed.value, bytes)) race(WRITE, owed.mine, owed.other, "write", *owed.range, owed.at);
}
HERE bool may_be_equal(Kind kind, Event mine, Event other, int64_t bytes) {
  const int a = mine.who % actors, b = other.who % actors;
  return kind == WRITE && bytes <= 16 && other.who >= 0 && mine.who / actors == other.who / actors && a < threads && b < threads && (equal_stores || a / 32 == b / 32);
}
HERE bool among(const Seen& s, int who) {
  if (s.all) return s.all[who] > 0;
  for (int i = 0; i < s.count; ++i)
    if (s.few[i].who == who) return true;
  return false;
}
// An access by an actor, as event `when` of it, of which `clock` says what came before.
UNWATCHED void access(Kind kind, const void* address, int64_t bytes, int who, int32_t when, const int32_t* clock) {
  const char* at = static_cast<const char*>(address);
  settle_stores();
  Range* range = range_at(at);
  if (!range) {
    if (kind != READ && static_cast<uint64_t>(at - &stacks[0][0]) >= sizeof stacks) stop("a write to memory that the test does not name");
    return;
  }
  const Event mine{who, when};
  const bool async = is_async(mine);
  const int64_t first = (at - range->begin) / range->unit, last = (at - range->begin + bytes - 1) / range->unit;
  if (at - range->begin + bytes > range->bytes) stop("an access beyond the end of an array");
  for (int64_t n = first; n <= last; ++n) {
    Cell& cell = range->cells[n];
    if (kind == READ && cell.reads.count && !cell.reads.all && cell.reads.few[0].who == who && cell.reads.few[0].when == when) continue;
    if (!covers(clock, cell.write, async)) {
      if (kind == READ && among(cell.reads, who)) continue;  // it has stored the same
      if (!may_be_equal(kind, mine, cell.write, bytes)) return race(kind, mine, cell.write, "write", *range, at);
      owed = Owed{at, bytes, mine, cell.write, range, {}};
      memcpy(owed.value, at, bytes);
      add(cell.reads, mine, clock);
      continue;
    }
    if (cell.updates && kind != UPDATE) {
      // The last of all updates was this thread's, and its value told it so: none is left to come.
      const Event last_update = cell.updates[1].few[0], e = uncovered(cell.updates[0], clock);
      if (e.who != NOBODY && !(kind == WRITE && last_update.who == who)) return race(kind, mine, e, "update", *range, at);
    }
    if (kind != READ) {
      const Event e = uncovered(cell.reads, clock);
      if (e.who != NOBODY) return race(kind, mine, e, "read", *range, at);
    }
    if (kind == READ) {
      add(cell.reads, mine, clock);
    } else if (kind == UPDATE) {
      if (!cell.updates) cell.updates = static_cast<Seen*>(calloc(2, sizeof(Seen)));
      add(cell.updates[0], mine, clock);
      cell.updates[1].few[0] = mine;
    } else {
      cell.write = mine;
      if (cell.reads.count || cell.reads.all) clear(cell.reads);
      if (cell.updates) {
        clear(cell.updates[0]);
        free(cell.updates);
        cell.updates = nullptr;
      }
    }
  }
}
// An access by the thread that runs.
UNWATCHED void access(Kind kind, const void* at, int64_t bytes) {
  if (static_cast<uint64_t>(static_cast<const char*>(at) - &stacks[0][0]) < sizeof stacks) return;
  access(kind, at, bytes, base() + current, own[current], clock_of(current));
}

// -- ranges ----------------------------------------------------------------------------------------
UNWATCHED void forget(Range& r) {
  for (int64_t n = 0; n < (r.bytes + r.unit - 1) / r.unit; ++n) {
    Cell& cell = r.cells[n];
    free(cell.reads.all);
    if (cell.updates) free(cell.updates[0].all), free(cell.updates);
    cell = Cell{{NOBODY, 0}, {}, nullptr};
  }
}
UNWATCHED void watch(char* begin, int64_t bytes, int64_t unit) {
  if (range_count == 64) abort();
  ranges[range_count] = {begin, bytes, unit, static_cast<Cell*>(calloc(bytes / unit + 1, sizeof(Cell)))};
  forget(ranges[range_count++]);
}
// `arrays` [count][address, bytes, bytes of an element, whether a launch that has not ended writes it, too].
UNWATCHED void start_launch(int ctas, const int64_t* arrays, int count) {
  grid = ctas;
  actors = (2 * threads + threads / 32 * 2 + MBARRIERS + 1 + 15) / 16 * 16;
  length = ctas * actors;
  clocks = static_cast<int32_t*>(calloc(static_cast<int64_t>(threads) * 2 * length + 16, 4));
  range_count = 0;
  watch(smem, MOST_SMEM, SHARED_UNIT);
  watch(__start_tw_shared, __stop_tw_shared - __start_tw_shared, SHARED_UNIT);
  shared_ranges = range_count;
  owed.bytes = 0;
  for (const int64_t* a = arrays; a < arrays + count * 4; a += 4) {
    watch(reinterpret_cast<char*>(a[0]), a[1], a[2]);
    const Range& r = ranges[range_count - 1];
    for (int64_t n = 0; a[3] && n < a[1] / a[2]; ++n) r.cells[n].write = {BEFORE, 1};
  }
}
UNWATCHED void start_cta(int number) {
  for (int half = 0; half < 2; ++half)  // what the threads of the CTA before knew
    for (int t = 0; t < threads; ++t) {
      int32_t* numbers = clock_of(t) + half * length;
      if (foreign) memset(numbers, 0, 4l * length);
      else memset(numbers + base(), 0, 4l * actors);
    }
  cta = number;
  foreign = false;
  for (int i = 0; i < shared_ranges; ++i) {
    forget(ranges[i]);
    memset(ranges[i].begin, 0xff, ranges[i].bytes);
  }
  for (int t = 0; t < threads; ++t) clock_of(t)[base() + t] = own[t] = 1;
}
UNWATCHED void end_launch() {
  for (int i = 0; i < range_count; ++i) {
    forget(ranges[i]);
    free(ranges[i].cells);
  }
  free(clocks);
}

// Whether the step of the protocol at a site is there: one of them may be left out.
UNWATCHED bool keeps(int site) {
  reached[site] = 1;
  return site != dropped;
}

}  // namespace simulated

extern "C" {
#define SIZED(bytes)                                                                                           \
  UNWATCHED void __tsan_read##bytes(void* p) { simulated::access(simulated::READ, p, bytes); }                 \
  UNWATCHED void __tsan_write##bytes(void* p) { simulated::access(simulated::WRITE, p, bytes); }               \
  UNWATCHED void __tsan_unaligned_read##bytes(void* p) { simulated::access(simulated::READ, p, bytes); }       \
  UNWATCHED void __tsan_unaligned_write##bytes(void* p) { simulated::access(simulated::WRITE, p, bytes); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
#undef SIZED
UNWATCHED void __tsan_read_range(void* p, unsigned long bytes) { simulated::access(simulated::READ, p, static_cast<int64_t>(bytes)); }
UNWATCHED void __tsan_write_range(void* p, unsigned long bytes) { simulated::access(simulated::WRITE, p, static_cast<int64_t>(bytes)); }
UNWATCHED void __tsan_vptr_update(void*, void*) {}
UNWATCHED void __tsan_vptr_read(void*) {}
UNWATCHED void __tsan_func_entry(void*) {}
UNWATCHED void __tsan_func_exit() {}
UNWATCHED void __tsan_init() {}
}
