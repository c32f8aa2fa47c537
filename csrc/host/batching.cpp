#include "batching.h"

#include <algorithm>
#include <string>

#include "../checks.h"

namespace engine_fast {
namespace {

constexpr const char* kWhere = "pack_batches";

void check_at_least_one(const char* name, int64_t value) {
  if (value < 1) refuse(kWhere, name, std::to_string(value), "1 or more");
}

int64_t sentence_at(const PackArgs& args, int64_t position) {
  const int64_t sentence = args.order[position];
  if (sentence < 0 || sentence >= args.num_sentences)
    refuse(kWhere, "order[" + std::to_string(position) + "]", std::to_string(sentence),
           "an index from 0 to " + std::to_string(args.num_sentences - 1));
  return sentence;
}

void check_length(const PackArgs& args, const char* side, int64_t sentence, int64_t length) {
  if (length >= 0 && length <= args.max_tokens) return;
  refuse(kWhere, std::string(side) + " length of sentence " + std::to_string(sentence), std::to_string(length),
         "0 to max_tokens = " + std::to_string(args.max_tokens) + "; raise max_tokens or drop the sentence");
}

}  // namespace

std::vector<int64_t> pack_batches(const PackArgs& args) {
  check_at_least_one("max_tokens", args.max_tokens);
  check_at_least_one("max_sentences", args.max_sentences);

  std::vector<int64_t> offsets{0};
  int64_t count = 0, longest = 0;  // of the open batch; the longer side decides, both have the same budget
  for (int64_t position = 0; position < args.num_ordered; ++position) {
    const int64_t sentence = sentence_at(args, position);
    const int64_t source = args.source_lengths[sentence], target = args.target_lengths[sentence];
    check_length(args, "source", sentence, source);
    check_length(args, "target", sentence, target);
    const int64_t length = std::max(source, target);
    if ((count + 1) * std::max(longest, length) > args.max_tokens || count == args.max_sentences) {
      offsets.push_back(position);
      count = 0;
      longest = 0;
    }
    ++count;
    longest = std::max(longest, length);
  }
  if (args.num_ordered > 0) offsets.push_back(args.num_ordered);
  return offsets;
}

}  // namespace engine_fast
