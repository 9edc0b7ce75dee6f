#!/usr/bin/env bash
# cargo and rustc 1.95.0: a profile for profile-guided optimisation that was recorded with `--target` is not found by a build
# of the same crate, for the same machine, without it; and nothing says so.
#
# Expected: a profile belongs to a source, a compiler and a target. The machine's own target, named or not, is the same one.
# Seen:     with `--target` the compiler finds the profile of a function, without it there is none: not a warning, rc 0, and a
#           program as if there were no profile. Only LLVM's own option -pgo-warn-missing-function tells them apart.
# Source:   run below. Profiles go by the names of symbols; theirs end in a hash of what cargo passes as `-C metadata`, which
#           has whether a target was named in it (and the features of a dependency, so that another selection of packages of a
#           workspace is enough, too), but not RUSTFLAGS.
# For us:   what would have been the build to measure had none of its profile (docs/benchmarks.md).
# Needs:    cargo, Debian 12's packages llvm-19 and libllvm19, from where apt gets them, without being installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download --quiet=2 llvm-19=1:19.1.7-3~deb12u1 libllvm19=1:19.1.7-3~deb12u1 2>/dev/null ||
  { echo 'not tried: apt has no llvm-19 of Debian 12' >&2; exit 77; }
for package in ./*.deb; do dpkg-deb --extract "$package" llvm; done
export LD_LIBRARY_PATH=$folder/llvm/usr/lib/x86_64-linux-gnu:$folder/llvm/usr/lib/llvm-19/lib
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"
TOML
cat >src/main.rs <<'RS'
#[inline(never)]
fn steps(mut number: u64) -> u64 {
    let mut steps = 0;
    while number != 1 {
        number = if number % 2 == 0 { number / 2 } else { 3 * number + 1 };
        steps += 1;
    }
    steps
}

fn main() {
    println!("{}", (1..10_000).map(steps).sum::<u64>());
}
RS
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="-Cprofile-generate=$folder/counts" cargo build --quiet --release --target "$host" --target-dir counted
"counted/$host/release/finding" >/dev/null
llvm/usr/lib/llvm-19/bin/llvm-profdata merge -o profile counts

use="-Cprofile-use=$folder/profile"
RUSTFLAGS=$use cargo build --release --target-dir quiet 2>quiet.txt
# How often the compiler misses the profile of `steps`.
missed() {
  RUSTFLAGS="$use -Cllvm-args=-pgo-warn-missing-function" cargo build --release --target-dir asked "$@" 2>asked.txt
  grep -c 'no profile data available for function _ZN7finding5steps' asked.txt || true
}
with=$(missed --target "$host")
without=$(missed)
warnings=$(grep -c warning quiet.txt || true)
echo "$(cargo --version): missed with --target $with, without it $without; warnings of the build without it: $warnings"
[ "$with" = 0 ] && [ "$without" -ge 1 ] && [ "$warnings" = 0 ]
