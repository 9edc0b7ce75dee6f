#!/usr/bin/env bash
# mimalloc (a crate, 0.1.52, which builds mimalloc 3): its heap asks for huge pages by default, also where the system gives
# them only on request.
#
# Expected: where transparent_hugepage/enabled is "madvise", a small program has none unless it asks; mimalloc's option for
#           large pages is off by default, and 2 MB of small allocations take little more than 2 MB.
# Seen:     the same program has several MB in huge pages, and none with the feature `no_thp`.
# Source:   the crate's feature `no_thp`; mimalloc's option allow_thp, which is on. Run below: AnonHugePages of
#           /proc/self/smaps_rollup.
# For us:   every process of a function touched, cleared and held 6 MB for the 2 that it uses: Cargo.toml has `no_thp`.
# Needs:    cargo, a C compiler, Linux with transparent_hugepage/enabled at madvise.
set -euo pipefail
grep -q '\[madvise\]' /sys/kernel/mm/transparent_hugepage/enabled || { echo 'not tried: transparent_hugepage/enabled is not madvise' >&2; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"
[features]
no_thp = ["mimalloc/no_thp"]
[dependencies]
mimalloc = { version = "=0.1.52", default-features = false }
libmimalloc-sys = "=0.1.49"
TOML
cat >src/main.rs <<'RS'
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let pieces: Vec<Vec<u8>> = (0..2048).map(|number| vec![number as u8; 1024]).collect();
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("AnonHugePages:")).unwrap();
    let kilobytes = line.split_whitespace().nth(1).unwrap();
    assert_eq!(pieces.len(), 2048);
    println!("{kilobytes}");
}
RS
by_default=$(cargo run --quiet --release)
without=$(cargo run --quiet --release --features no_thp)
echo "2 MB in pieces of 1 KiB: $by_default KB in huge pages by default, $without KB with no_thp"
[ "$by_default" -ge 2048 ] && [ "$without" -eq 0 ]
