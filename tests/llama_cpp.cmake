# What `make test` compiles of llama.cpp: the libraries that llama-cpp-python loads, and not the programs' common one,
# which is a third of the work. Included by CMake at `project()` of both; ggml, which computes, keeps its optimisation.
if(PROJECT_NAME STREQUAL "ggml")
    set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
else()
    set(LLAMA_BUILD_COMMON OFF)
    set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")
endif()
