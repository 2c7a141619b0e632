/* hf3fs_py_usrbio._window: a Python type that shows memory at an address as a writable buffer.
 *
 * It holds nothing but the number: who closes the memory first meets no BufferError, as with the
 * classes of 3FS, and must not look through the window afterwards. */
#include <Python.h>

typedef struct {
  PyObject_HEAD
  char *address;
  Py_ssize_t length;
} Window;

static int window_init(PyObject *self, PyObject *arguments, PyObject *names) {
  static char *keywords[] = {"address", "length", NULL};
  unsigned long long address;
  Py_ssize_t length;
  if (!PyArg_ParseTupleAndKeywords(arguments, names, "Kn", keywords, &address, &length)) return -1;
  if (length < 0 || (address == 0 && length > 0)) {
    PyErr_SetString(PyExc_ValueError, "a window needs an address and a length of 0 or more bytes");
    return -1;
  }
  ((Window *)self)->address = (char *)(uintptr_t)address;
  ((Window *)self)->length = length;
  return 0;
}

static int window_getbuffer(PyObject *self, Py_buffer *view, int flags) {
  Window *window = (Window *)self;
  return PyBuffer_FillInfo(view, self, window->address, window->length, 0, flags);
}

static PyType_Slot window_slots[] = {
    {Py_tp_doc, "Memory at an address, as a writable buffer of bytes."},
    {Py_tp_init, window_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_bf_getbuffer, window_getbuffer},
    {0, NULL},
};
static PyType_Spec window_spec = {
    .name = "hf3fs_py_usrbio._window.Window",
    .basicsize = sizeof(Window),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = window_slots,
};

static int fill(PyObject *module) {
  PyObject *type = PyType_FromSpec(&window_spec);
  if (!type) return -1;
  int failed = PyModule_AddObjectRef(module, "Window", type);
  Py_DECREF(type);
  return failed;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_window", .m_slots = module_slots};

PyMODINIT_FUNC PyInit__window(void) { return PyModuleDef_Init(&definition); }
