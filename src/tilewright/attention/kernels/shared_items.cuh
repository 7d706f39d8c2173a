// Items of shared keys, which a launch in front of a decode kernel does, and the states that it leaves.
//
// An item is a block of at most BLOCK queries of all requests of a node, with one KV head and one chunk of the keys of
// the node. Items are numbered by node, chunk, head and block, so that those that read the same keys follow each other.
// Of each node, chunk, row of q and query head there is a state in memory: outputs not yet divided, maximum (of
// scores · log2 e) and sum. The rows of a chunk lie one after the other. In front of this file: table.h.

namespace tw {

struct SharedItem {
  int node, head, chunk, chunks;
  int token, end;  // rows of q
  int row;         // of the state of the first
};

// The node of item `number` of a plan; all lanes of a warp ask for the same one.
template <class P>
TW_INLINE int shared_node(const P& p, int number, int lane) {
  int n = 0;  // the last of `count` nodes from n on that has its first item at `number` or before: 32 at once
  for (int count = static_cast<int>(p.shared_nodes); count > 1;) {
    const int step = (count + 31) / 32;
    const bool before = lane * step < count && node_at(p, n + lane * step).item <= number;
    const int skipped = (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
    n += skipped;
    count = step < count - skipped ? step : count - skipped;
  }
  return n;
}
// The item, which node `n` has. The node is given, so that its words and those of its pages are on their way at once.
template <int BLOCK, class P>
TW_INLINE SharedItem shared_item(const P& p, int n, const Node& node, int number) {
  const int first = first_row(p, node.begin), end = first_row(p, node.end), blocks = (end - first + BLOCK - 1) / BLOCK;
  const int of_heads = (number - node.item) / blocks, block = (number - node.item) % blocks, chunk = of_heads / p.kv_heads;
  const int token = first + block * BLOCK, last = token + BLOCK < end ? token + BLOCK : end;
  return SharedItem{n, of_heads % p.kv_heads, chunk, node.chunks, token, last, node.row + chunk * (end - first) + block * BLOCK};
}

}  // namespace tw
