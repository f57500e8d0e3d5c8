#include "core/request_rows.h"

#include <algorithm>

namespace moe_native {

void RequestRows::execute(int64_t first, int64_t count, int64_t drafts, std::vector<Run>& runs) {
  const int64_t end = first + count;
  const int64_t first_draft = end - drafts;
  for (int64_t at = first; at < end;) {
    int64_t stop = end;
    const auto edge = [&](int64_t position) {
      if (at < position && position < stop) stop = position;
    };
    uint16_t modality = kText;
    const auto span = std::ranges::upper_bound(media_, at, {}, &MediaSpan::end);
    if (span != media_.end()) {
      edge(span->first);
      edge(span->end);
      if (span->first <= at) modality = span->modality;
    }
    edge(prompt_);
    edge(lowest_);
    edge(executed_);
    edge(first_draft);

    const uint16_t phase = prompt_ < 0 ? 0 : at < prompt_ ? kPrefill : kDecode;
    const bool again = lowest_ <= at && at < executed_;
    const auto row_class = static_cast<uint16_t>(phase | modality << kModalityShift | kAttributed |
                                                 (again ? kRecomputed : 0) | (at >= first_draft ? kDraft : 0));
    runs.push_back({index_, static_cast<uint32_t>(at), static_cast<uint32_t>(stop - at), row_class,
                    again ? kRunRecomputed : uint16_t{0}});
    at = stop;
  }
  lowest_ = std::min(lowest_, first);
  executed_ = std::max(executed_, end);
}

}  // namespace moe_native
