# What this machine's GPUs, driver and CUDA compiler are fit for: sets NATTEN_NATIVE_ARCHS, empty where there is no GPU or
# one has to do without; the compiler; and NATTEN_NATIVE_WARNING, which says what does not fit and what to do.
set(compiler)
if(CMAKE_CUDA_COMPILER)
  set(compiler --compiler ${CMAKE_CUDA_COMPILER})
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -B ${CMAKE_CURRENT_LIST_DIR}/../codegen/gpus.py
          --cmake ${CMAKE_CURRENT_BINARY_DIR}/native.cmake ${compiler}
  COMMAND_ERROR_IS_FATAL ANY)
include(${CMAKE_CURRENT_BINARY_DIR}/native.cmake)
