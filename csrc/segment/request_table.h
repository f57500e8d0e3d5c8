// The notes that travel with steps: which requests a segment has defined already, and which have ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "segment/step_data.h"

namespace moe_native {

class RequestTable {
 public:
  // The lines that a block of these steps carries: new facts, and the definition of each request that it names and that
  // this segment does not have yet. Call it for steps that cannot be written too: what they say of requests holds.
  std::vector<std::string> lines_for(std::span<const StepData* const> steps);
  // The block is in the file. Until then facts about earlier steps are said again.
  void written();
  // A new segment repeats the definitions it needs, so that it can be read alone.
  void new_segment();

 private:
  struct Request {
    std::string line;
    bool in_segment = false;
  };
  std::unordered_map<uint32_t, Request> requests_;
  std::vector<std::string> facts_;
};

}  // namespace moe_native
