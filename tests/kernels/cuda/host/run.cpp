// Runs one op on the emulation. Standard input: records of (name, bytes), each led by
// its length; a tensor is its storage under its name and NAME.meta, the text
// "dtype offset rank sizes... strides...". Standard output: "ok", and the storages of
// the tensors in `outputs` in order; or the text of the exception.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "ops.h"
#include "primitives.cuh"

namespace tidal::emulation {
extern int processors;
}

namespace {

struct Bytes {
  std::unique_ptr<char[]> data;  // of exactly the right size: the sanitizer guards it
  size_t size = 0;
};

std::map<std::string, Bytes> records;

Bytes read_bytes() {
  uint64_t size = 0;
  if (!std::cin.read(reinterpret_cast<char*>(&size), sizeof(size))) return {};
  Bytes bytes{std::unique_ptr<char[]>(new char[size]), size};
  std::cin.read(bytes.data.get(), static_cast<std::streamsize>(size));
  return bytes;
}

std::string text(const std::string& name) {
  const auto found = records.find(name);
  if (found == records.end()) throw std::logic_error("no record " + name);
  return {found->second.data.get(), found->second.size};
}

bool has(const std::string& name) { return records.count(name) > 0; }

double number(const std::string& name) { return std::stod(text(name)); }
int64_t integer(const std::string& name) { return std::stoll(text(name)); }

tidal::TensorView tensor(const std::string& name) {
  std::istringstream meta(text(name + ".meta"));
  tidal::TensorView view;
  int64_t offset_bytes = 0;
  meta >> view.dtype >> view.device >> view.device_index >> offset_bytes >> view.rank;
  for (int i = 0; i < view.rank; ++i) meta >> view.sizes[i];
  for (int i = 0; i < view.rank; ++i) meta >> view.strides[i];
  if (!meta) throw std::logic_error("bad meta of " + name);
  view.data = records.at(name).data.get() + offset_bytes;
  return view;
}

void attend(const std::string& op) {
  tidal::AttendArguments a;
  a.query = tensor("query");
  a.kv_cache = tensor("kv_cache");
  a.block_table = tensor("block_table");
  a.seq_lens = tensor("seq_lens");
  a.lse = tensor("lse");
  a.partial_lse = tensor("partial_lse");
  a.scale = number("scale");
  a.k_scale = number("k_scale");
  a.select_block_size = integer("select_block_size");
  tidal::TensorView output, partial_out, block_lse, topk_blocks, topk_lens;
  if (has("block_lse")) a.block_lse = &(block_lse = tensor("block_lse"));
  if (op == "score_blocks") return tidal::score_blocks(a);
  a.output = &(output = tensor("output"));
  a.partial_out = &(partial_out = tensor("partial_out"));
  a.v_scale = number("v_scale");
  if (op == "dense_decode") return tidal::dense_decode(a);
  a.topk_blocks = &(topk_blocks = tensor("topk_blocks"));
  a.topk_lens = &(topk_lens = tensor("topk_lens"));
  tidal::sparse_decode(a);
}

void select() {
  tidal::SelectArguments a;
  a.block_lse = tensor("block_lse");
  a.lse = tensor("lse");
  a.seq_lens = tensor("seq_lens");
  a.topk_blocks = tensor("topk_blocks");
  a.topk_lens = tensor("topk_lens");
  a.mass = tensor("mass");
  a.token_budget = integer("token_budget");
  a.select_block_size = integer("select_block_size");
  a.sink_tokens = integer("sink_tokens");
  a.recent_tokens = integer("recent_tokens");
  a.sparse_threshold = integer("sparse_threshold");
  tidal::select_blocks(a);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (;;) {
    Bytes name = read_bytes();
    if (!name.data) break;
    const std::string key{name.data.get(), name.size};
    records[key] = read_bytes();
  }
  try {
    tidal::emulation::set_schedule(static_cast<unsigned>(integer("schedule")));
    tidal::emulation::processors = static_cast<int>(integer("processors"));
    const std::string op = text("op");
    if (op == "select_blocks") {
      select();
    } else {
      attend(op);
    }
  } catch (const std::exception& error) {
    std::cout << error.what();
    return 0;
  }
  std::cout << "ok";
  std::istringstream outputs(text("outputs"));
  for (std::string name; outputs >> name;) {
    std::cout.write(records.at(name).data.get(),
                    static_cast<std::streamsize>(records.at(name).size));
  }
  return 0;
}
