# SPDX-License-Identifier: Apache-2.0
# What every target of this project shares: warnings, sanitizers, include root.

add_library(zerod_options INTERFACE)
target_include_directories(zerod_options INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(zerod_options INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -fno-omit-frame-pointer
  # The arithmetic is part of the contract: a*b+c is fused only where the source says so.
  -ffp-contract=off)
if(ZEROD_WERROR)
  target_compile_options(zerod_options INTERFACE -Werror)
endif()
if(ZEROD_SANITIZE)
  # The preset says how much debug information: line numbers are enough for a report, and types
  # cost as much time as the instrumentation.
  target_compile_options(zerod_options INTERFACE -fsanitize=${ZEROD_SANITIZE})
  target_link_options(zerod_options INTERFACE -fsanitize=${ZEROD_SANITIZE})
  if(ZEROD_SANITIZE MATCHES "undefined")
    target_compile_options(zerod_options INTERFACE -fno-sanitize-recover=undefined)
  endif()
  if(ZEROD_SANITIZE MATCHES "thread")
    # gcc warns that TSan does not model fences; the code that relies on one also uses seq_cst
    # operations on the words concerned.
    target_compile_options(zerod_options INTERFACE -Wno-tsan)
  endif()
endif()

# zerod_library(NAME SOURCES... DEPS targets...)
function(zerod_library name)
  cmake_parse_arguments(arg "" "" "SOURCES;DEPS" ${ARGN})
  if(arg_SOURCES)
    add_library(${name} STATIC ${arg_SOURCES})
    target_link_libraries(${name} PUBLIC zerod_options ${arg_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE zerod_options ${arg_DEPS})
  endif()
endfunction()

# zerod_label_test(NAME labels...): of a test whose executable has its name.
# Labels choose what a sanitizer build runs: `ctest -L tsan`; the target tests_tsan builds it.
function(zerod_label_test name)
  set_tests_properties(${name} PROPERTIES LABELS "${ARGN}")
  foreach(label IN LISTS ARGN)
    if(NOT TARGET tests_${label})
      add_custom_target(tests_${label})
    endif()
    add_dependencies(tests_${label} ${name})
  endforeach()
endfunction()

# zerod_test(NAME SOURCES... DEPS targets... LABELS labels... TIMEOUT seconds)
function(zerod_test name)
  cmake_parse_arguments(arg "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE zerod_options ${arg_DEPS} GTest::gmock GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT})
  zerod_label_test(${name} ${arg_LABELS})
endfunction()
