/* CRC32C of a run of blocks in one call that releases the GIL. Limited API, no state but tables. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "crc32c.h"

static PyObject *crc32c_blocks(PyObject *self, PyObject *args) {
    Py_buffer data;
    Py_ssize_t block;
    if (!PyArg_ParseTuple(args, "y*n", &data, &block)) return NULL;
    if (block <= 0) {
        PyBuffer_Release(&data);
        PyErr_SetString(PyExc_ValueError, "block_bytes must be positive");
        return NULL;
    }
    Py_ssize_t count = data.len / block + (data.len % block != 0);
    PyObject *result = PyBytes_FromStringAndSize(NULL, count * 4);
    if (result != NULL && count != 0) {
        uint32_t *out = (uint32_t *)PyBytes_AsString(result);
        Py_BEGIN_ALLOW_THREADS
        blocks(data.buf, (size_t)data.len, (size_t)block, out);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return result;
}

static PyMethodDef methods[] = {
    {"crc32c_blocks", crc32c_blocks, METH_VARARGS, "CRC32C of each block, packed native u32."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void) {
    crc32c_begin();
    return PyModule_Create(&module);
}
