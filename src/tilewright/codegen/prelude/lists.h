// Choices and row workspaces for loops over lists of coordinates.
namespace tw {

// `condition ? a : b` without a branch, which random lists would mispredict every other time.
template <class T>
TW_INLINE T pick(bool condition, T a, T b) {
  using bits = typename int_of<sizeof(T)>::type;
  bits x, y;
  __builtin_memcpy(&x, &a, sizeof(T));
  __builtin_memcpy(&y, &b, sizeof(T));
  y ^= (x ^ y) & -static_cast<bits>(condition);
  __builtin_memcpy(&a, &y, sizeof(T));
  return a;
}

// The coordinates of one row and the sum that belongs to each (V = bool: none). `gather` writes them
// to `entries`, ascending; `clear` makes room for the next row.
//
// Up to `kDense` columns: an array of sums, and a bitmap with a summary of it, which lists the
// coordinates in order without sorting. Beyond: a hash table, whose memory is in proportion to the
// longest row, and a merge sort.
template <class K, class V>
struct row_workspace {
  struct entry { K key; V value; };

  entry* entries = nullptr;
  int64_t count = 0;

  explicit row_workspace(int64_t columns) : is_dense(columns <= kDense) {
    if (is_dense) {
      words = zeros<uint64_t>(columns / 64 + 1);
      groups = zeros<uint64_t>(group_count = columns / 4096 + 1);
      if constexpr (kHasValues) sums = zeros<V>(columns + 1);
    } else {
      reserve(int64_t(1) << kFewest);
      slots = zeros<slot>(int64_t(1) << (allocated = kFewest));
      use(kFewest);
    }
  }
  ~row_workspace() {
    void* const all[] = {entries, spare, slots, words, groups, sums};
    for (void* p : all) __builtin_free(p);
  }
  row_workspace(const row_workspace&) = delete;

  inline __attribute__((always_inline)) void add(K key, V value) {
    if (!is_dense) return insert(key, value);
    const uint64_t bit = UINT64_C(1) << (key & 63), word = words[key >> 6];
    count += !(word & bit);
    words[key >> 6] = word | bit;
    groups[key >> 12] |= UINT64_C(1) << (key >> 6 & 63);
    if constexpr (kHasValues) sums[key] += value;
  }
  bool holds(K key) const {
    if (is_dense) return words[key >> 6] >> (key & 63) & 1;
    for (uint32_t at = hash(key); slots[at].stamp == stamp; at = (at + 1) & mask)
      if (entries[slots[at].number].key == key) return true;
    return false;
  }
  void gather() {
    if (!is_dense) return sort();
    if (count > capacity) reserve(count);
    entry* next = entries;
    for (int64_t g = 0; g < group_count; ++g)
      for (uint64_t group = groups[g]; group; group &= group - 1) {
        const int64_t at = g * 64 + __builtin_ctzll(group);
        for (uint64_t word = words[at]; word; word &= word - 1) {
          next->key = static_cast<K>(at * 64 + __builtin_ctzll(word));
          if constexpr (kHasValues) {
            next->value = sums[next->key];
            sums[next->key] = 0;
          }
          ++next;
        }
      }
  }
  void clear() {
    count = 0;
    if (!is_dense) return use(kFewest);
    for (int64_t g = 0; g < group_count; ++g) {
      for (uint64_t group = groups[g]; group; group &= group - 1)
        words[g * 64 + __builtin_ctzll(group)] = 0;
      groups[g] = 0;
    }
  }

 private:
  static constexpr int64_t kDense = 1 << 18;
  static constexpr int kFewest = 6;  // log2 of the slots of an empty table
  static constexpr bool kHasValues = !same<V, bool>::value;
  // A slot is empty unless it has the stamp of this row, so that clearing the table costs nothing.
  struct slot { uint32_t stamp, number; };

  const bool is_dense;
  uint64_t *words = nullptr, *groups = nullptr;
  V* sums = nullptr;
  entry* spare = nullptr;
  slot* slots = nullptr;
  int64_t group_count = 0, capacity = 0;
  uint32_t stamp = 0, mask = 0;
  int bits = 0, allocated = 0;

  template <class T>
  static T* zeros(int64_t n) {
    void* const p = __builtin_calloc(n, sizeof(T));
    if (!p) __builtin_trap();
    return static_cast<T*>(p);
  }
  void reserve(int64_t n) {
    capacity = n;
    entries = static_cast<entry*>(__builtin_realloc(entries, n * sizeof(entry)));
    if (!is_dense) spare = static_cast<entry*>(__builtin_realloc(spare, n * sizeof(entry)));
    if (!entries || (!is_dense && !spare)) __builtin_trap();
  }

  uint32_t hash(K key) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(key) * UINT64_C(0x9E3779B97F4A7C15)) >> (64 - bits));
  }
  void insert(K key, V value) {
    uint32_t at = hash(key);
    for (; slots[at].stamp == stamp; at = (at + 1) & mask) {
      entry& e = entries[slots[at].number];
      if (e.key == key) {
        if constexpr (kHasValues) e.value += value;
        return;
      }
    }
    slots[at] = {stamp, static_cast<uint32_t>(count)};
    entries[count++] = {key, value};
    if (count > mask / 2) grow();
  }
  // An empty table of 2^n slots, in the memory that there is.
  void use(int n) {
    bits = n;
    mask = (1u << n) - 1;
    if (++stamp == 0) {
      __builtin_memset(slots, 0, sizeof(slot) << allocated);
      stamp = 1;
    }
  }
  __attribute__((noinline)) void grow() {
    if (bits == allocated) {
      __builtin_free(slots);
      slots = zeros<slot>(int64_t(1) << ++allocated);
      reserve(int64_t(1) << allocated);
      stamp = 0;
    }
    use(bits + 1);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t at = hash(entries[i].key);
      while (slots[at].stamp == stamp) at = (at + 1) & mask;
      slots[at] = {stamp, static_cast<uint32_t>(i)};
    }
  }
  // Sorted runs of 8 by insertion, merged by doubling.
  void sort() {
    const int64_t run = 8;
    for (int64_t first = 0; first < count; first += run) {
      const int64_t last = first + run < count ? first + run : count;
      for (int64_t i = first + 1; i < last; ++i) {
        const entry e = entries[i];
        int64_t j = i;
        for (; j > first && e.key < entries[j - 1].key; --j) entries[j] = entries[j - 1];
        entries[j] = e;
      }
    }
    for (int64_t width = run; width < count; width *= 2) {
      for (int64_t first = 0; first < count; first += 2 * width) {
        const int64_t middle = first + width < count ? first + width : count;
        const int64_t last = middle + width < count ? middle + width : count;
        int64_t a = first, b = middle;
        for (int64_t i = first; i < last; ++i) {
          const bool right = a == middle || (b < last && entries[b].key < entries[a].key);
          spare[i] = entries[right ? b : a];
          a += !right;
          b += right;
        }
      }
      entry* const merged = spare;
      spare = entries;
      entries = merged;
    }
  }
};

}  // namespace tw
