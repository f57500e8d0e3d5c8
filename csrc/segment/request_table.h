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
  // this segment does not have yet. Nothing is forgotten before written() says that the block is in the file.
  std::vector<std::string> lines_for(std::span<const StepData* const> steps);
  void written();
  // A new segment repeats the definitions it needs, so that it can be read alone.
  void new_segment();

 private:
  struct Request {
    std::string line;
    bool in_segment = false;
  };
  std::unordered_map<uint32_t, Request> requests_;
  std::vector<uint32_t> emitted_;  // by the block that is being written
  std::vector<uint32_t> ended_;
};

}  // namespace moe_native
