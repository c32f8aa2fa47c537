// Token-budget batch packer. Knows neither torch nor Python: plain pointers in, a vector out.
#pragma once

#include <cstdint>
#include <vector>

namespace engine_fast {

struct PackArgs {
  const int32_t* source_lengths;  // (num_sentences,) tokens, end symbol included
  const int32_t* target_lengths;  // (num_sentences,) tokens, end symbol included
  int64_t num_sentences;
  const int64_t* order;  // (num_ordered,) sentence indices; consecutive ones share a batch
  int64_t num_ordered;
  int64_t max_tokens;     // longest length x number of sentences, each side by itself
  int64_t max_sentences;  // per batch
};

// Offsets [0, .., num_ordered] into `order`: batch i is order[offsets[i] .. offsets[i + 1]).
// Greedy: a sentence joins the open batch while (count + 1) * longest <= max_tokens holds on both sides and
// count < max_sentences. Throws std::invalid_argument for an index out of range, a negative length, a budget below
// one, and a sentence that is longer than max_tokens by itself.
std::vector<int64_t> pack_batches(const PackArgs& args);

}  // namespace engine_fast
