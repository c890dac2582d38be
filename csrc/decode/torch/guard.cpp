// See guard.h. It runs no Python code, and looks at dictionaries in the order of their entries.
#include "decode/torch/guard.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace mblm::decode {

namespace py = pybind11;

namespace {

// Without the calls and counting of references that a tensor's own functions come with.
const c10::StorageImpl* storage_of(c10::TensorImpl& tensor) {
  return tensor.has_storage() ? tensor.unsafe_storage().unsafeGetStorageImpl() : nullptr;
}

// Versions count writes; a tensor made in inference mode has none.
int64_t version_of(c10::TensorImpl& tensor) {
  return tensor.is_inference() ? 0 : int64_t(tensor.version_counter().current_version());
}

// Dropout by a module of its own, or by an attribute of that name.
bool drops(py::handle module, py::handle dropout_class) {
  if (py::isinstance(module, dropout_class)) return module.attr("p").cast<double>() > 0;
  const py::object dropout = py::getattr(module, "dropout", py::float_(0.0));
  const bool is_number = PyFloat_Check(dropout.ptr()) || PyLong_Check(dropout.ptr());
  return is_number && dropout.cast<double>() > 0;
}

}  // namespace

Guard::Guard(const py::list& parts, const py::list& hooks, const py::list& dicts) {
  PyUnicode_InternInPlace(&forward_.ptr());
  PyUnicode_InternInPlace(&training_.ptr());
  const py::object dropout_class = py::module_::import("torch.nn").attr("Dropout");
  for (const py::handle pair : parts) {
    const auto items = py::cast<py::tuple>(pair);
    const py::object module = items[0], kind = items[1];
    will_look_at(module.ptr(), sizeof(PyObject));
    if (!PyType_Check(kind.ptr())) throw py::type_error("Guard: expected a class in parts");
    parts_.push_back({own(module), own(kind), watch_dict(module.attr("__dict__")),
                      drops(module, dropout_class)});
    hooks_.push_back(watch_dict(module.attr("_forward_hooks")));
    hooks_.push_back(watch_dict(module.attr("_forward_pre_hooks")));
    const auto has_kind = [&](const Class& of) { return kind.ptr() == of.kind; };
    if (std::none_of(classes_.begin(), classes_.end(), has_kind)) {
      classes_.push_back({kind.ptr(), own(kind.attr("forward"))});
    }
  }
  for (const py::handle dict : hooks) hooks_.push_back(watch_dict(dict));
  for (const py::handle dict : dicts) {
    const size_t first = values_.size();
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);) {
      values_.push_back(watch_entry(value));
    }
    dicts_.push_back({watch_dict(dict, true), first, values_.size() - first});
  }
}

PyObject* Guard::own(py::object object) {
  owned_.push_back(std::move(object));
  return owned_.back().ptr();
}

void Guard::will_look_at(const void* memory, size_t size) {
  constexpr size_t kLine = 64;
  const auto* const first = static_cast<const char*>(memory);
  for (size_t at = 0; at < size; at += kLine) lines_.push_back(first + at);
}

// Of one that is read, about as much as its table of hashes and its entries take.
PyObject* Guard::watch_dict(py::handle dict, bool is_read) {
  if (!PyDict_Check(dict.ptr())) throw py::type_error("Guard: expected a dictionary");
  const auto* const object = reinterpret_cast<const PyDictObject*>(dict.ptr());
  will_look_at(object, sizeof(PyDictObject));
  if (is_read) will_look_at(object->ma_keys, 64 + 24 * size_t(object->ma_used));
  return own(py::reinterpret_borrow<py::object>(dict));
}

// A module, a tensor or None.
PyObject* Guard::watch_entry(py::handle handle) {
  PyObject* const object = own(py::reinterpret_borrow<py::object>(handle));
  if (!THPVariable_Check(object)) return object;
  const at::Tensor& unpacked = THPVariable_Unpack(object);
  c10::TensorImpl& tensor = *unpacked.unsafeGetTensorImpl();
  will_look_at(object, sizeof(THPVariable));
  will_look_at(&tensor, sizeof(tensor));
  const c10::StorageImpl* const storage = storage_of(tensor);
  if (storage) {
    will_look_at(storage, sizeof(c10::StorageImpl));
    storages_.push_back(unpacked.storage());
  }
  const bool is_strided = tensor.layout() == at::kStrided;
  tensors_.push_back({object, own(py::type::of(handle)), storage,
                      storage ? storage->data() : nullptr, tensor.storage_offset(),
                      version_of(tensor), shapes_.size(), is_strided ? size_t(tensor.dim()) : 0});
  if (is_strided) {
    for (const at::IntArrayRef numbers : {tensor.sizes(), tensor.strides()}) {
      shapes_.insert(shapes_.end(), numbers.begin(), numbers.end());
    }
  }
  return object;
}

bool Guard::holds() const {
  if (owned_.empty()) return false;  // it was cleared
  for (const void* line : lines_) __builtin_prefetch(line);
  const auto is_empty = [](PyObject* dict) { return PyDict_Size(dict) == 0; };
  const auto all_hold = [this](const auto& items) {
    return std::all_of(items.begin(), items.end(),
                       [this](const auto& item) { return holds(item); });
  };
  return std::all_of(hooks_.begin(), hooks_.end(), is_empty) && all_hold(parts_) &&
         all_hold(classes_) && all_hold(dicts_) && all_hold(tensors_);
}

bool Guard::holds(const Part& part) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(part.module)) != part.kind) return false;
  if (PyDict_Contains(part.own, forward_.ptr()) != 0) return false;
  return !part.drops || PyDict_GetItemWithError(part.own, training_.ptr()) == Py_False;
}

bool Guard::holds(const Class& of) const {
  const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(of.kind, forward_.ptr()));
  if (!now) PyErr_Clear();
  return now.ptr() == of.forward;
}

bool Guard::holds(const Entries& entries) const {
  if (PyDict_Size(entries.dict) != Py_ssize_t(entries.count)) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  for (size_t i = entries.first; i < entries.first + entries.count; ++i) {
    if (!PyDict_Next(entries.dict, &at, &key, &value) || value != values_[i]) return false;
  }
  return true;
}

bool Guard::holds(const Watched& watched) const {
  // `torch.utils.swap_tensors` gives an object another tensor and class, `.data =` a tensor other
  // memory or sizes, `share_memory_` memory another place.
  if (reinterpret_cast<PyObject*>(Py_TYPE(watched.object)) != watched.type) return false;
  c10::TensorImpl& tensor = *THPVariable_Unpack(watched.object).unsafeGetTensorImpl();
  const c10::StorageImpl* memory = storage_of(tensor);
  if (memory != watched.storage) return false;
  if (memory && memory->data() != watched.data) return false;
  if (tensor.storage_offset() != watched.offset || version_of(tensor) != watched.version) {
    return false;
  }
  if (tensor.layout() != at::kStrided) return true;
  const int64_t* const shape = shapes_.data() + watched.shape;
  return tensor.sizes().equals({shape, watched.dims}) &&
         tensor.strides().equals({shape + watched.dims, watched.dims});
}

void Guard::clear() {
  const auto owned =
      std::move(owned_);  // what is freed may run Python code, and ask whether it holds
  owned_.clear();
}

namespace {

// Null before it is constructed, when Python may ask already.
Guard* guard_of(PyObject* self) {
  auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Guard>() : nullptr;
}

int traverse(PyObject* self, visitproc visit, void* arg) {  // the name that Py_VISIT takes
  Py_VISIT(Py_TYPE(self));
  if (const Guard* guard = guard_of(self)) {
    for (const py::object& object : guard->owned()) Py_VISIT(object.ptr());
  }
  return 0;
}

int clear(PyObject* self) {
  if (Guard* guard = guard_of(self)) guard->clear();
  return 0;
}

}  // namespace

void bind_guard(py::module_& module) {
  const py::custom_type_setup is_collected([](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = traverse;
    type->tp_clear = clear;
  });
  py::class_<Guard>(module, "Guard", is_collected)
      .def(py::init<const py::list&, const py::list&, const py::list&>(), py::arg("parts"),
           py::arg("hooks"), py::arg("dicts"))
      .def("holds", [](const Guard& guard) { return guard.holds(); });
}

}  // namespace mblm::decode
