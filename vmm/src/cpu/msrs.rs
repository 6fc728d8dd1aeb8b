//! Reading and writing a vCPU's MSRs.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4, table 2-2, as all of these).
pub(crate) const TSC: u32 = 0x10;
/// IA32_MISC_ENABLE.
pub(crate) const MISC_ENABLE: u32 = 0x1a0;
/// IA32_MTRR_DEF_TYPE: set at boot, but not in KVM's list of MSRs.
pub(crate) const MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// An MSR could not be set to the wanted value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("MSR {index:#x} does not take {wanted:#x}{}", had(*.is))]
struct Refused {
    index: u32,
    wanted: u64,
    /// The value that it has; `None` if it cannot be read either.
    is: Option<u64>,
}

fn had(is: Option<u64>) -> String {
    is.map_or_else(String::new, |is| format!(", and has {is:#x}"))
}

pub(crate) fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Access to MSRs with the behaviour of `KVM_GET_MSRS` and `KVM_SET_MSRS`: in the order of the
/// list, up to the first MSR that fails.
pub(crate) trait Registers {
    /// Reads into `list`. Returns how many were read.
    fn get(&self, list: &mut Msrs) -> Result<usize, KvmError>;
    /// Writes `list`. Returns how many were written.
    fn set(&self, list: &Msrs) -> Result<usize, KvmError>;
}

impl Registers for VcpuFd {
    fn get(&self, list: &mut Msrs) -> Result<usize, KvmError> {
        self.get_msrs(list).map_err(KvmError::of("KVM_GET_MSRS"))
    }

    fn set(&self, list: &Msrs) -> Result<usize, KvmError> {
        self.set_msrs(list).map_err(KvmError::of("KVM_SET_MSRS"))
    }
}

/// Returns the MSRs of `indices` that can be read, in their order. KVM lists some that this guest
/// does not have; those are left out.
pub(crate) fn read(
    vcpu: &impl Registers,
    indices: impl Iterator<Item = u32>,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut left: Vec<kvm_msr_entry> = indices.map(|index| entry(index, 0)).collect();
    let mut read = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let mut list = list_of(&left)?;
        let count = vcpu.get(&mut list)?;
        read.extend_from_slice(list.as_slice().get(..count).unwrap_or(&[]));
        left.drain(..(count + 1).min(left.len()));
    }
    Ok(read)
}

pub(crate) fn read_one(vcpu: &impl Registers, index: u32) -> Result<Option<u64>, KvmError> {
    let read = read(vcpu, std::iter::once(index))?;
    Ok(read.first().map(|msr| msr.data))
}

/// Writes all `entries`, in their order. An MSR that KVM refuses to write is skipped if it has the
/// wanted value already.
///
/// # Errors
/// Also when a refused MSR has another value: the guest would continue with a value that it does
/// not expect.
pub(crate) fn write(vcpu: &impl Registers, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut left = entries;
    while !left.is_empty() {
        let count = vcpu.set(&list_of(left)?)?;
        let Some(refused) = left.get(count) else {
            break;
        };
        let is = read_one(vcpu, refused.index)?;
        if is != Some(refused.data) {
            return Err(KvmError {
                call: "KVM_SET_MSRS",
                source: std::io::Error::other(Refused {
                    index: refused.index,
                    wanted: refused.data,
                    is,
                }),
            });
        }
        left = left.get(count + 1..).unwrap_or(&[]);
    }
    Ok(())
}

fn list_of(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError {
        call: "MSR list",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::error::Error as _;

    use super::*;

    /// A vCPU with these MSRs (index, value, whether it can be written), which answers as KVM does.
    struct Played(RefCell<Vec<(u32, u64, bool)>>);

    impl Played {
        fn new(msrs: &[(u32, u64, bool)]) -> Self {
            Self(RefCell::new(msrs.to_vec()))
        }

        fn find(&self, index: u32) -> Option<(u64, bool)> {
            let msrs = self.0.borrow();
            let found = msrs.iter().find(|(of, ..)| *of == index);
            found.map(|(_, data, writable)| (*data, *writable))
        }
    }

    impl Registers for Played {
        fn get(&self, list: &mut Msrs) -> Result<usize, KvmError> {
            for (done, msr) in list.as_mut_slice().iter_mut().enumerate() {
                match self.find(msr.index) {
                    Some((data, _)) => msr.data = data,
                    None => return Ok(done),
                }
            }
            Ok(list.as_slice().len())
        }

        fn set(&self, list: &Msrs) -> Result<usize, KvmError> {
            for (done, msr) in list.as_slice().iter().enumerate() {
                let mut msrs = self.0.borrow_mut();
                let found = msrs.iter_mut().find(|(of, ..)| *of == msr.index);
                match found {
                    Some((_, data, true)) => *data = msr.data,
                    _ => return Ok(done),
                }
            }
            Ok(list.as_slice().len())
        }
    }

    #[test]
    fn what_cannot_be_read_is_left_out_wherever_it_stands() {
        let vcpu = Played::new(&[(2, 20, true), (4, 40, false)]);
        let read = read(&vcpu, 1..6).unwrap();
        let read: Vec<_> = read.iter().map(|msr| (msr.index, msr.data)).collect();
        assert_eq!(read, [(2, 20), (4, 40)]);
        assert_eq!(read_one(&vcpu, 3).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_written_must_have_its_value() {
        let msrs = [(1, 10, true), (2, 20, false), (3, 30, true)];
        let vcpu = Played::new(&msrs);
        write(&vcpu, &[entry(1, 11), entry(2, 20), entry(3, 33)]).unwrap();
        assert_eq!(
            (vcpu.find(1), vcpu.find(3)),
            (Some((11, true)), Some((33, true)))
        );
        let refused = write(&vcpu, &[entry(1, 12), entry(2, 21)]).unwrap_err();
        let source = refused.source().unwrap().to_string();
        assert_eq!(source, "MSR 0x2 does not take 0x15, and has 0x14");
        let refused = write(&vcpu, &[entry(9, 1)]).unwrap_err();
        let source = refused.source().unwrap().to_string();
        assert_eq!(source, "MSR 0x9 does not take 0x1");
    }
}
