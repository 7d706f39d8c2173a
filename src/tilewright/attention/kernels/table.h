// The page table of a batch: how many keys a request has, where in the cache a key lies, and which
// positions its keys and queries have.
//
// For C++ and CUDA: TW_INLINE comes from either prelude, TW_METHOD from the family. Expects before it
// the namespace `table`, which says which arrays the table has (attention/table.py). `P` is a kernel's
// parameter struct; absent arrays are not read. Entries are clamped to the pages that exist, so that no
// table makes a kernel read outside the cache.

namespace tw {

struct Pages {  // of one request: its entries of the table, the number of its keys, their positions
  int64_t first, count;
  int32_t length, base, stride;

  // The position of a key in the sequence; wraps around like int32.
  TW_METHOD int32_t position(int32_t key) const {
    if constexpr (!table::KEY_POSITIONS) return key;
    return static_cast<int32_t>(static_cast<uint32_t>(base) + static_cast<uint32_t>(stride) * static_cast<uint32_t>(key));
  }
};

template <class P>
TW_INLINE Pages pages_of(const P& p, int request, int max_keys) {
  Pages pages{0, 0, 0, 0, 1};
  if constexpr (table::INDPTR) {
    int64_t begin = p.table_indptr[request], end = p.table_indptr[request + 1];
    begin = begin < 0 ? 0 : begin;
    end = end > p.table_limit ? p.table_limit : end;
    pages.first = begin;
    pages.count = end > begin ? end - begin : 0;
  } else {
    int64_t row = request;
    if constexpr (table::ROWS) row = p.table_rows[request];
    if (row >= 0 && row < p.table_limit) {
      pages.first = row * p.table_stride;
      pages.count = p.table_width;
    }
  }
  if (p.pages == 0) pages.count = 0;
  int64_t length = pages.count * p.page_size;
  if constexpr (table::LENGTHS) {
    const int64_t wanted = p.kv_len[request];
    length = wanted < 0 ? 0 : wanted < length ? wanted : length;
  }
  pages.length = static_cast<int32_t>(length < max_keys ? length : max_keys);
  if constexpr (table::KEY_POSITIONS) {
    pages.base = p.kv_base[request];
    pages.stride = p.kv_stride[request];
  }
  return pages;
}

// The page of the cache that entry `n` of a request names.
template <class P>
TW_INLINE int64_t page_at(const P& p, const Pages& pages, int64_t n) {
  int64_t page = pages.first + n;
  if constexpr (table::ENTRIES) page = p.table_entries[page];
  return page < 0 || page >= p.pages ? 0 : page;
}

// The position of the first of a request's `queries`.
template <class P>
TW_INLINE int32_t first_query(const P& p, const Pages& pages, int request, int queries) {
  if constexpr (table::QUERY_POSITIONS) return p.qo_base[request];
  return pages.length - queries;
}

}  // namespace tw
