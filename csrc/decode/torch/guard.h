// Watches the modules and tensors that packed weights were made of.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mblm::decode {

// It owns what it looks at, so that nothing can be freed under it. All functions need the GIL.
class Guard {
 public:
  // parts: pairs of a module and the class that it is of. hooks: dictionaries of hooks for all
  // modules. dicts: dictionaries of modules, parameters and buffers whose entries are to stay the
  // same objects.
  Guard(const pybind11::list& parts, const pybind11::list& hooks, const pybind11::list& dicts);

  // Whether calling the modules still computes what it did: they are of their classes, whose
  // `forward` is the same, without hooks, and those that drop anything are not in training; and
  // whether all entries are the same, tensors with the same memory, not written to. Tensors made in
  // inference mode do not count writes.
  bool holds() const;

  // What it owns, for Python's collector of garbage; lets go of it, after which nothing holds.
  const std::vector<pybind11::object>& owned() const { return owned_; }
  void clear();

 private:
  struct Part {
    PyObject *module, *kind, *own;
    bool drops;
  };
  struct Class {
    PyObject *kind, *forward;
  };
  struct Entries {
    PyObject* dict;
    size_t first, count;  // of values_
  };
  struct Watched {
    PyObject *object, *type;
    const c10::StorageImpl* storage;
    const void* data;
    int64_t offset, version;
    size_t shape, dims;  // sizes, then strides, in shapes_; none of one that is not strided
  };

  PyObject* own(pybind11::object object);
  PyObject* watch_dict(pybind11::handle dict, bool is_read = false);
  PyObject* watch_entry(pybind11::handle object);
  void will_look_at(const void* memory, size_t size);
  bool holds(const Part& part) const;
  bool holds(const Class& of) const;
  bool holds(const Entries& entries) const;
  bool holds(const Watched& watched) const;

  std::vector<pybind11::object> owned_;  // all that follows points to
  std::vector<Part> parts_;
  std::vector<Class> classes_;
  std::vector<PyObject*> hooks_;  // of the parts, too
  std::vector<Entries> dicts_;
  std::vector<Watched> tensors_;  // among the entries
  // What a tensor has. Not the tensor, of which `torch.utils.swap_tensors` wants to be the owner.
  std::vector<c10::Storage> storages_;
  std::vector<PyObject*> values_;
  std::vector<int64_t> shapes_;
  // Where all that lies, as it was: between two calls the caches forget it, and it is quicker to
  // ask for all at once than for each when it is read.
  std::vector<const void*> lines_;
  pybind11::object forward_{pybind11::str("forward")}, training_{pybind11::str("training")};
};

// Adds the class to a module.
void bind_guard(pybind11::module_& module);

}  // namespace mblm::decode
