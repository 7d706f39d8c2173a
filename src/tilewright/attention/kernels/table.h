// The page table of a batch: how many keys a request has, where in the cache a key lies, and which
// positions its keys and queries have.
//
// For C++ and CUDA: TW_INLINE comes from either prelude, TW_METHOD from the family. Expects before it
// the namespace `table`, which says which arrays the table has (attention/table.py). `P` is a kernel's
// parameter struct; absent arrays are not read. Entries are clamped to the pages that exist, so that no
// table makes a kernel read outside the cache.

namespace tw {

struct Pages {  // of one node: its entries of the table, the number of its keys, their positions
  int64_t first, count;
  int32_t length, base, stride;

  // The position of a key in the sequence; wraps around like int32.
  TW_METHOD int32_t position(int32_t key) const {
    if constexpr (!table::KEY_POSITIONS && table::LEVELS == 1) return key;
    return static_cast<int32_t>(static_cast<uint32_t>(base) + static_cast<uint32_t>(stride) * static_cast<uint32_t>(key));
  }
  // The number of a key among all of its requests.
  TW_METHOD int32_t number(int32_t key) const { return table::LEVELS == 1 ? key : base + key; }
};

// A row of a table: requests begin … end − 1 have its keys, behind `base` keys of lower levels. Where no
// keys are shared it is a request; else the nodes of shared keys come first, then one for each request. A plan
// decides which nodes a launch in front does: those that have `chunks` above 0, its items from number `item` on and
// states from row `row` on (shared_items.cuh). A request walks the keys of its others itself, those of `outer` next
// (-1: no more); `joined` is the next that a launch in front does.
struct Node {
  int32_t begin, end, base, level, outer, joined, chunks, item, row;
};

template <class P>
TW_INLINE Node node_at(const P& p, int node) {
  if constexpr (table::LEVELS == 1) return Node{node, node + 1, 0, 0, -1, -1, 0, 0, 0};
  else return reinterpret_cast<const Node*>(p.nodes)[node];
}
template <class P>
TW_INLINE int own_node(const P& p, int request) {
  if constexpr (table::LEVELS == 1) return request;
  else return p.shared_nodes + request;
}

template <class P>
TW_INLINE Pages pages_of(const P& p, int node, int max_keys) {
  Pages pages{0, 0, 0, 0, 1};
  if constexpr (table::INDPTR) {
    int64_t begin = p.table_indptr[node], end = p.table_indptr[node + 1];
    begin = begin < 0 ? 0 : begin;
    end = end > p.table_limit ? p.table_limit : end;
    pages.first = begin;
    pages.count = end > begin ? end - begin : 0;
  } else {
    int64_t row = node;
    if constexpr (table::ROWS) row = p.table_rows[node];
    if (row >= 0 && row < p.table_limit) {
      pages.first = row * p.table_stride;
      pages.count = p.table_width;
    }
  }
  if (p.pages == 0) pages.count = 0;
  int64_t length = pages.count * p.page_size;
  if constexpr (table::LENGTHS) {
    const int64_t wanted = p.kv_len[node];
    length = wanted < 0 ? 0 : wanted < length ? wanted : length;
  }
  pages.length = static_cast<int32_t>(length < max_keys ? length : max_keys);
  if constexpr (table::KEY_POSITIONS) {
    pages.base = p.kv_base[node];
    pages.stride = p.kv_stride[node] < 1 ? 1 : p.kv_stride[node];
  }
  if constexpr (table::LEVELS > 1) pages.base = node_at(p, node).base;
  return pages;
}

// Entry `n` of a request, for one KV head; the page of the cache that an entry names.
template <class P>
TW_INLINE int64_t entry_at(const P& p, const Pages& pages, int head, int64_t n) {
  int64_t page = pages.first + n;
  if constexpr (table::BY_HEAD) page += head * p.table_head;
  if constexpr (table::ENTRIES) page = p.table_entries[page];
  return page;
}
template <class P>
TW_INLINE int64_t cached_page(const P& p, int64_t entry) { return entry < 0 || entry >= p.pages ? 0 : entry; }
template <class P>
TW_INLINE int64_t page_at(const P& p, const Pages& pages, int head, int64_t n) { return cached_page(p, entry_at(p, pages, head, n)); }

// Without qo_indptr each request has one query: the loads of q wait for no other load.
template <class P>
TW_INLINE int first_row(const P& p, int request) { return p.qo_indptr ? p.qo_indptr[request] : request; }

// The position of the first of a request's `queries`.
template <class P>
TW_INLINE int32_t first_query(const P& p, const Pages& pages, int request, int queries) {
  if constexpr (table::QUERY_POSITIONS) return p.qo_base[request];
  return pages.base + pages.length - queries;
}

// Whose a row of q is: its position, request, and the queries and keys of that request.
struct Row { int32_t position, request, qo_len, kv_len; };

// Row `token` of q, one of those that have the keys of a node.
template <class P>
TW_INLINE Row row_of(const P& p, int of, int token, int max_keys) {
  const Node node = node_at(p, of);
  int request = node.begin;
  for (int high = node.end - 1; request < high;) {  // the one whose rows hold `token`
    const int middle = request + (high - request) / 2;
    if (first_row(p, middle + 1) <= token) request = middle + 1; else high = middle;
  }
  const int begin = first_row(p, request), queries = first_row(p, request + 1) - begin;
  const Pages own = pages_of(p, own_node(p, request), max_keys);
  return Row{first_query(p, own, request, queries) + (token - begin), request, queries, own.number(own.length)};
}

}  // namespace tw
