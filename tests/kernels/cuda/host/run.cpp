// Runs one op on the emulation. Standard input: records, each a name and bytes, both
// preceded by their length. A tensor is two records: its storage under its name, and the
// text "dtype device index offset rank sizes... strides..." under NAME.meta. Standard
// output: "ok" and the storages of the tensors named in `outputs`, in that order; or the
// text of the exception.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
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
  const Bytes& bytes = records.at(name);
  tidal::emulation::guard(bytes.data.get(), bytes.size);
  view.data = bytes.data.get() + offset_bytes;
  return view;
}

// Fills in each argument from the record of its name.
struct FromRecords {
  void operator()(const char* name, tidal::TensorView& to) const { to = tensor(name); }
  template <class View>
  void operator()(const char* name, std::optional<View>& to) const {
    if (has(name)) static_cast<tidal::TensorView&>(to.emplace()) = tensor(name);
  }
  void operator()(const char* name, double& to) const { to = number(name); }
  void operator()(const char* name, int64_t& to) const { to = integer(name); }
  void operator()(const char* name, std::optional<int64_t>& to) const {
    if (has(name)) to = integer(name);
  }
};

template <class Arguments>
void call(void (*op)(const Arguments&)) {
  Arguments arguments;
  for_each_argument(arguments, FromRecords{});
  op(arguments);
}

void run(const std::string& op) {
  if (op == "dense_decode") return call(tidal::dense_decode);
  if (op == "score_blocks") return call(tidal::score_blocks);
  if (op == "sparse_decode") return call(tidal::sparse_decode);
  if (op == "select_blocks") return call(tidal::select_blocks);
  throw std::logic_error("no op " + op);
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
    run(text("op"));
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
