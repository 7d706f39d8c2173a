// The page table of a batch: how many keys a request has, and where in the cache a key lies.
//
// Read by C++ and CUDA; TW_INLINE comes from either prelude. `P` is a kernel's parameter struct, with
// kv_indptr, kv_indices (null: page n is page n), last_page_len (null: full pages), `listed` entries of
// kv_indices, `pages` of the cache and page_size. What the arrays hold is clamped to what exists, so
// that no table makes a kernel read outside the cache.

namespace tw {

struct Pages {  // of one request: its entries of kv_indices, and its keys
  int64_t first, count;
  int32_t length;
};

template <class P>
TW_INLINE Pages pages_of(const P& p, int request, int max_keys) {
  int64_t begin = p.kv_indptr[request], end = p.kv_indptr[request + 1];
  int64_t last = p.last_page_len ? p.last_page_len[request] : p.page_size;
  begin = begin < 0 ? 0 : begin;
  end = end > p.listed ? p.listed : end;
  const int64_t count = end > begin && p.pages > 0 ? end - begin : 0;
  last = last < 0 ? 0 : last > p.page_size ? p.page_size : last;
  const int64_t length = count ? (count - 1) * p.page_size + last : 0;
  return Pages{begin, count, static_cast<int32_t>(length < max_keys ? length : max_keys)};
}

// The page of the cache that entry `n` of a request names.
template <class P>
TW_INLINE int64_t page_at(const P& p, const Pages& pages, int64_t n) {
  if (!p.kv_indices) return pages.first + n;
  const int64_t page = p.kv_indices[pages.first + n];
  return page < 0 || page >= p.pages ? 0 : page;
}

}  // namespace tw
