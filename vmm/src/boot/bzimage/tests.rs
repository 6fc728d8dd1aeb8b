//! Tests with generated bzImages, intact and damaged.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

/// Returns compressible data that is larger than an lz4 block.
fn kernel() -> Vec<u8> {
    let words = (0u32..(9 << 20) / 16).map(|n| n.wrapping_mul(2_654_435_761) >> 20);
    words.flat_map(|n| [n.to_le_bytes(); 4].concat()).collect()
}

fn gzip(kernel: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(kernel).unwrap();
    encoder.finish().unwrap()
}

fn with_size(mut packed: Vec<u8>, kernel: &[u8]) -> Vec<u8> {
    packed.extend((kernel.len() as u32).to_le_bytes());
    packed
}

/// Packs like scripts/xz_wrap.sh: CRC32, the x86 filter, LZMA2.
fn xz(kernel: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(0);
    options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(kernel).unwrap();
    with_size(writer.finish().unwrap(), kernel)
}

fn zstd(kernel: &[u8]) -> Vec<u8> {
    with_size(zstd::encode_all(kernel, 1).unwrap(), kernel)
}

fn lz4(kernel: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(LZ4_BLOCK) {
        let block = lz4_flex::block::compress(block);
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
    }
    with_size(packed, kernel)
}

const HEADER: usize = 3 * 512 + 100;

/// A bzImage with two setup sectors and `payload` 100 bytes after them.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0x90; HEADER];
    file[0x1f1] = 2;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file.extend([0xcc; 64]);
    file
}

fn unpacked(bytes: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let file = memfd().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let head = &bytes[..bytes.len().min(0x400)];
    let unpacked = unpack(&file, head, bytes.len() as u64)?;
    let mut content = vec![0; usize::try_from(unpacked.metadata().unwrap().len()).unwrap()];
    unpacked.read_exact_at(&mut content, 0).unwrap();
    Ok(content)
}

type Pack = fn(&[u8]) -> Vec<u8>;
const PACKINGS: [(&str, Pack); 4] = [("gzip", gzip), ("xz", xz), ("zstd", zstd), ("lz4", lz4)];

#[test]
fn every_packing_is_unpacked() {
    let kernel = kernel();
    for (name, pack) in PACKINGS {
        let found = unpacked(&bzimage(&pack(&kernel))).unwrap();
        assert!(found == kernel, "{name}");
    }
}

#[test]
fn a_size_that_is_not_the_kernels_is_found_out() {
    let kernel = &kernel()[..100_000];
    for (name, pack) in PACKINGS {
        for said in [0, 99_999, 100_001, MAX_UNPACKED as u32] {
            let mut payload = pack(kernel);
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&said.to_le_bytes());
            let error = unpacked(&bzimage(&payload)).unwrap_err();
            // gzip's decoder checks the size itself.
            let fits = matches!(error, BzImageError::Length { said: s, .. } if s == u64::from(said))
                || matches!(error, BzImageError::Damaged(_)) && name == "gzip";
            assert!(fits, "{name} {said}: {error}");
        }
        let mut payload = pack(kernel);
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&(MAX_UNPACKED as u32 + 1).to_le_bytes());
        assert!(matches!(
            unpacked(&bzimage(&payload)),
            Err(BzImageError::TooLarge(_))
        ));
    }
}

#[test]
fn what_unpacks_to_more_than_it_says_stops_one_byte_later() {
    let zeroes = vec![0; 64 << 20];
    for (name, pack) in PACKINGS {
        let mut payload = pack(&zeroes);
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&1000u32.to_le_bytes());
        match unpacked(&bzimage(&payload)).unwrap_err() {
            // lz4 is unpacked in whole blocks.
            BzImageError::Length { found, said: 1000 } => {
                assert!(found <= 1001 || name == "lz4" && found == LZ4_BLOCK as u64);
            }
            error => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn a_window_that_no_kernel_has_is_refused_before_memory_is_taken() {
    let mut options = lzma_rust2::XzOptions::with_preset(0);
    options.lzma_options.dict_size = 1 << 30;
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(&[7; 5000]).unwrap();
    let payload = with_size(writer.finish().unwrap(), &[7; 5000]);
    assert!(matches!(
        unpacked(&bzimage(&payload)),
        Err(BzImageError::Damaged(_))
    ));
}

#[test]
fn a_file_that_is_cut_short_is_refused_at_every_length() {
    let kernel = &kernel()[..20_000];
    for (name, pack) in PACKINGS {
        let whole = bzimage(&pack(kernel));
        let end = whole.len() - 64;
        assert!(unpacked(&whole[..end]).is_ok());
        for len in (0x206..end).step_by(31).chain([end - 1]) {
            let error = unpacked(&whole[..len]).unwrap_err();
            assert!(
                matches!(error, BzImageError::Outside),
                "{name} {len}: {error}"
            );
        }
    }
}

#[test]
fn packings_that_we_do_not_know_are_named() {
    for (magic, name) in [
        (&b"BZh91AY"[..], "bzip2"),
        (b"\x5d\0\0\x80\0", "lzma"),
        (b"\x89LZO\0", "lzo"),
        (b"\x7fELF\x02", "something"),
    ] {
        let error = unpacked(&bzimage(&[magic, &[0; 8]].concat())).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_old_boot_protocol_is_named() {
    let mut file = bzimage(&gzip(b"kernel"));
    file[0x206..0x208].copy_from_slice(&0x0207u16.to_le_bytes());
    let error = unpacked(&file).unwrap_err();
    assert!(error.to_string().contains("2.07"), "{error}");
}

#[test]
fn a_flipped_bit_is_found_wherever_a_checksum_covers_it() {
    let kernel = &kernel()[..20_000];
    for (name, pack) in [PACKINGS[0], PACKINGS[1]] {
        let whole = bzimage(&pack(kernel));
        for at in (HEADER + 16..whole.len() - 64).step_by(17) {
            let mut file = whole.clone();
            file[at] ^= 4;
            // A bit without meaning, such as padding, may have any value.
            let unseen = unpacked(&file).is_ok_and(|found| found != kernel);
            assert!(!unseen, "{name}: byte {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damage_never_does_more_than_give_an_error(
        which in 0usize..4, edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut file = bzimage(&PACKINGS[which].1(&[1, 2, 3, 4].repeat(500)));
        for (at, value) in edits {
            let at = 0x1f1 + at.index(file.len() - 0x1f1);
            file[at] = value;
        }
        if let Ok(content) = unpacked(&file) {
            prop_assert!(content.len() as u64 <= MAX_UNPACKED);
        }
    }
}
