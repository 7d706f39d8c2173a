// Memory for what one iteration of a loop computes.
namespace tw {

// Short rows lie on the stack. Longer ones are allocated, and the next rows use the same memory.
template <class T>
struct row_memory {
  static constexpr int64_t kShort = 4096 / sizeof(T);

  row_memory() = default;
  ~row_memory() { release(); }
  row_memory(const row_memory&) = delete;

  T* sized(int64_t n) {
    if (n > capacity) {
      release();
      capacity = n;
      memory = static_cast<T*>(__builtin_malloc(n * sizeof(T)));
      if (!memory) __builtin_trap();
    }
    return memory;
  }

 private:
  void release() {
    if (memory != buffer) __builtin_free(memory);
  }
  T buffer[kShort];
  T* memory = buffer;
  int64_t capacity = kShort;
};

}  // namespace tw
