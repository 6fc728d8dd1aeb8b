//! Guests of a few instructions: machine code that runs at 1 MiB in 64-bit ring 0.
//!
//! [`Code`] is just enough of an assembler for a hostile driver: it reaches the virtio-mmio
//! regions, writes memory, waits for register bits and prints registers on the serial console.

use hearth_vmm::cache::TemplateKey;
use hearth_vmm::{SnapshotError, Template, Vm, VmConfig};

/// The port on which our kernel reports how it ended.
pub const REPORT_PORT: u16 = 0x5f0;
/// Data register of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Start of the first virtio-mmio region (vsock); the second (balloon) follows it directly.
pub const MMIO_BASE: u32 = 0xd000_0000;
/// Size of a region in bytes.
pub const MMIO_SIZE: u32 = 0x1000;

/// Machine code under construction. It may use the registers rax, rbx, rcx and rdx freely.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Code(Vec<u8>);

impl Code {
    /// Starts without an instruction.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends these bytes unchanged.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Writes a byte to a port.
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        // mov al, value; mov dx, port; out dx, al
        self.raw(&[0xb0, value, 0x66, 0xba, low, high, 0xee])
    }

    /// Prints text on the serial console.
    pub fn print(self, text: &str) -> Self {
        text.bytes()
            .fold(self, |code, byte| code.out(SERIAL_PORT, byte))
    }

    /// Reports an exit as our kernel does: 1 power off, 2 restart, 3 halt, 4 panic.
    pub fn report(self, how: u8) -> Self {
        self.out(REPORT_PORT, how)
    }

    /// Loads an empty table with `lidt`, then runs an undefined instruction: no handler can be
    /// reached.
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x0b])
    }

    /// Loops for ever.
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Sleeps for ever: `hlt` with interrupts off.
    pub fn sleep(self) -> Self {
        // l: hlt; jmp l
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// Writes 32 bits to guest memory below 2 GiB.
    pub fn store(self, address: u32, value: u32) -> Self {
        assert!(address < 1 << 31, "an absolute address is sign-extended");
        // mov dword [address], value
        self.raw(&[0xc7, 0x04, 0x25])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Writes 16 bits to guest memory below 2 GiB.
    pub fn store16(self, address: u32, value: u16) -> Self {
        assert!(address < 1 << 31, "an absolute address is sign-extended");
        // mov word [address], value
        self.raw(&[0x66, 0xc7, 0x04, 0x25])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Writes 64 bits to guest memory.
    pub fn store64(self, address: u32, value: u64) -> Self {
        let [low, high] = [value as u32, (value >> 32) as u32];
        self.store(address, low).store(address + 4, high)
    }

    /// Maps the virtio-mmio regions and selects one of them (0 vsock, 1 balloon) for the calls
    /// below. The mapping is needed once per guest; it is repeated each time because that does no
    /// harm.
    pub fn device(self, index: u32) -> Self {
        // The boot page tables lie at 0x9000 and map the first GiB; the fourth GiB gets a page
        // directory at 2 MiB with one page of 2 MiB: present, writable, large.
        self.store64(0x20_0400, u64::from(MMIO_BASE) | 0x83)
            .store64(0xa018, 0x20_0003)
            // mov ebx, base
            .raw(&[0xbb])
            .raw(&(MMIO_BASE + index * MMIO_SIZE).to_le_bytes())
    }

    /// Writes a device register.
    pub fn write(self, offset: u64, value: u32) -> Self {
        // mov dword [rbx + offset], value
        self.raw(&[0xc7, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Writes one byte of a device register.
    pub fn write8(self, offset: u64, value: u8) -> Self {
        // mov byte [rbx + offset], value
        self.raw(&[0xc6, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&[value])
    }

    /// Writes two bytes of a device register.
    pub fn write16(self, offset: u64, value: u16) -> Self {
        // mov word [rbx + offset], value
        self.raw(&[0x66, 0xc7, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Writes eight bytes, the value sign-extended, at a device register.
    pub fn write64(self, offset: u64, value: i32) -> Self {
        // mov qword [rbx + offset], value
        self.raw(&[0x48, 0xc7, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Prints the byte at an address below 2 GiB on the serial console, unchanged.
    pub fn print_byte(self, address: u32) -> Self {
        assert!(address < 1 << 31, "an absolute address is sign-extended");
        // mov al, [address]; mov dx, 0x3f8; out dx, al
        self.raw(&[0x8a, 0x04, 0x25])
            .raw(&address.to_le_bytes())
            .raw(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// Runs `body`, which must not change r8, `count` times.
    pub fn repeat(self, count: u32, body: Code) -> Self {
        let body = body.bytes();
        // dec r8d; jnz back to the body: 3 and 6 bytes
        let back = -(i32::try_from(body.len()).expect("a short body") + 9);
        // mov r8d, count
        self.raw(&[0x41, 0xb8])
            .raw(&count.to_le_bytes())
            .raw(&body)
            .raw(&[0x41, 0xff, 0xc8, 0x0f, 0x85])
            .raw(&back.to_le_bytes())
    }

    /// Prints the low byte of a device register on the serial console, unchanged.
    pub fn print_register(self, offset: u64) -> Self {
        // mov eax, [rbx + offset]; mov dx, 0x3f8; out dx, al
        self.raw(&[0x8b, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// Waits until one of `bits` (the low seven) is set in a device register.
    pub fn await_register(self, offset: u64, bits: u8) -> Self {
        assert!(bits < 0x80, "the mask is sign-extended");
        // l: test dword [rbx + offset], bits; jz l
        self.raw(&[0xf7, 0x83])
            .raw(&(offset as u32).to_le_bytes())
            .raw(&u32::from(bits).to_le_bytes())
            .raw(&[0x74, 0xf4])
    }

    /// Waits until the 16 bits at an address below 2 GiB are no longer `value`.
    pub fn await_change16(self, address: u32, value: u16) -> Self {
        // l: cmp word [address], value; je l
        self.raw(&[0x66, 0x81, 0x3c, 0x25])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
            .raw(&[0x74, 0xf4])
    }

    /// Returns the machine code.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }

    /// Boots the code in a VM of 32 MiB, one vCPU and a serial console.
    ///
    /// # Panics
    /// If the VM cannot be created.
    #[must_use]
    pub fn boot(self) -> Vm {
        let config = VmConfig::flat(self.bytes()).memory_mib(32).console(true);
        Vm::boot(&config.build().expect("a possible configuration")).expect("a VM")
    }
}

/// Returns an ELF file with these (address, content) segments; its entry point is the first one's
/// address.
#[must_use]
pub fn elf(segments: &[(u64, &[u8])]) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    let mut file = vec![0; HEADER + PROGRAM_HEADER * segments.len()];
    let mut put = |at: usize, bytes: &[u8]| {
        file.get_mut(at..at + bytes.len())
            .expect("inside the headers")
            .copy_from_slice(bytes);
    };
    // Class 64, little endian, version 1; type EXEC, machine x86-64.
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0, 1]);
    let entry = segments.first().map_or(0, |(address, _)| *address);
    put(24, &entry.to_le_bytes());
    put(32, &(HEADER as u64).to_le_bytes());
    put(
        52,
        &[
            HEADER as u8,
            0,
            PROGRAM_HEADER as u8,
            0,
            segments.len() as u8,
        ],
    );
    let mut offset = HEADER + PROGRAM_HEADER * segments.len();
    for (index, (address, content)) in segments.iter().enumerate() {
        let at = HEADER + PROGRAM_HEADER * index;
        let len = content.len() as u64;
        put(at, &[1, 0, 0, 0, 7]);
        put(at + 8, &(offset as u64).to_le_bytes());
        put(at + 16, &address.to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &len.to_le_bytes());
        put(at + 40, &len.to_le_bytes());
        offset += content.len();
    }
    for (_, content) in segments {
        file.extend_from_slice(content);
    }
    file
}

/// Returns a static program for a guest's Linux: the machine code between two labels, which may
/// modify itself.
///
/// # Safety
/// The bytes from `start` to `end` must be initialized, and nothing may change them.
#[must_use]
pub unsafe fn program(start: *const u8, end: *const u8) -> Vec<u8> {
    /// The offset in its page is the offset of the code in its file, behind the headers.
    const ADDRESS: u64 = 0x40_0078;
    // SAFETY: guaranteed by the caller.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    elf(&[(ADDRESS, code)])
}

/// Returns the key of the template that [`cached_template`] makes for `number`.
pub fn flat_key(number: u64) -> TemplateKey {
    TemplateKey::new().part("flat", number.to_le_bytes())
}

/// Makes a template of a guest that prints its number and powers off, with 4 MiB of memory that is
/// not zero.
///
/// # Errors
/// If the host fails to create it.
///
/// # Panics
/// If the VM cannot be created.
pub fn cached_template(number: u64) -> Result<Template, SnapshotError> {
    let mut code = Code::new().print(&number.to_string()).report(1).spin();
    code = code.raw(&crate::noise(4 << 20, number + 1));
    let config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    let config = config.build().expect("a possible configuration");
    Vm::create(&config).expect("a VM").into_template()
}
