//! The subset of pickle that a PyTorch state dict needs: builds values and calls nothing.
//!
//! Values live in one list and refer to each other by index, so that malicious nesting causes no recursion and a memo
//! no copies. Each opcode makes at most one value, and the number of values is limited.

use std::collections::BTreeMap;

/// Size limit for a pickle, in bytes. A state dict of 10,000 tensors has 1.5 MB.
pub(super) const MAX_BYTES: u64 = 8 << 20;
/// Limit on values in a pickle. A tensor takes about 20.
const MAX_VALUES: usize = 1 << 19;
/// Limit on marks open at once. A state dict has a few.
const MAX_MARKS: usize = 1 << 8;
/// Limit on the name of a module, class or storage, in bytes.
pub(super) const MAX_NAME: usize = 256;

/// The index of a value.
pub(super) type Id = usize;

/// A value in a state dict's pickle.
pub(super) enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// A persistent id: PyTorch's reference to a storage.
    Storage(Id),
    Tensor(RebuiltTensor),
}

/// Arguments of `_rebuild_tensor_v2`.
#[derive(Clone, Copy)]
pub(super) struct RebuiltTensor {
    pub storage: Id,
    pub offset: Id,
    pub shape: Id,
    pub stride: Id,
}

/// The only globals that a pickle may name.
#[derive(Clone, Copy)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// The name of its number type, and bytes per number.
    Storage(&'static str, u64),
}

impl Global {
    fn lookup(module: &str, name: &str) -> Result<Self, String> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::Storage("F32", 4),
            ("torch", "HalfStorage") => Self::Storage("F16", 2),
            ("torch", "BFloat16Storage") => Self::Storage("BF16", 2),
            ("torch", "DoubleStorage") => Self::Storage("F64", 8),
            ("torch", "LongStorage") => Self::Storage("I64", 8),
            ("torch", "IntStorage") => Self::Storage("I32", 4),
            ("torch", "ShortStorage") => Self::Storage("I16", 2),
            ("torch", "CharStorage") => Self::Storage("I8", 1),
            ("torch", "ByteStorage") => Self::Storage("U8", 1),
            ("torch", "BoolStorage") => Self::Storage("BOOL", 1),
            _ => {
                return Err(format!(
                    "calls `{}.{}`; only tensors are supported, and no code is run",
                    module.escape_default(),
                    name.escape_default()
                ));
            }
        })
    }
}

/// A decoded pickle: values that refer to each other by index.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Errors: a pickle that is truncated, calls anything but the functions in `Global`, or is larger than any state
    /// dict.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let pickle = Self { values: Vec::new(), root: 0 };
        let mut machine = PickleMachine { bytes, pickle, stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new() };
        machine.pickle.root = machine.run()?;
        Ok(machine.pickle)
    }

    /// The top-level value.
    pub fn root(&self) -> &Value<'a> {
        self.value(self.root)
    }

    /// Never panics on an [`Id`] of this pickle: `push` made all of them.
    pub fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id]
    }

    pub fn text(&self, id: Id) -> Result<&'a str, String> {
        match self.value(id) {
            Value::Text(text) => Ok(text),
            _ => Err("has something else where a string is expected".to_owned()),
        }
    }

    pub fn tuple(&self, id: Id) -> Result<&[Id], String> {
        match self.value(id) {
            Value::Tuple(items) => Ok(items),
            _ => Err("has something else where a tuple is expected".to_owned()),
        }
    }
}

struct PickleMachine<'a> {
    /// The unread rest.
    bytes: &'a [u8],
    pickle: Pickle<'a>,
    stack: Vec<Id>,
    /// Stack heights.
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

impl<'a> PickleMachine<'a> {
    /// Runs to the end and returns the value on top of the stack.
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let code = self.byte()?;
            match code {
                // PROTO, FRAME: nothing depends on them.
                0x80 => _ = self.byte()?,
                0x95 => _ = self.take(8)?,
                // GLOBAL, INST, STACK_GLOBAL
                b'c' => {
                    let global = self.global_line()?;
                    self.push(Value::Global(global))?;
                }
                b'i' => {
                    // INST calls at once, which is not allowed even for permitted globals.
                    self.global_line()?;
                    return Err(unknown(code));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let global = Global::lookup(self.pickle.text(module)?, self.pickle.text(name)?)?;
                    self.push(Value::Global(global))?;
                }
                // BINPUT, LONG_BINPUT, MEMOIZE
                b'q' => {
                    let slot = u32::from(self.byte()?);
                    self.put(slot)?;
                }
                b'r' => {
                    let slot = self.u32()?;
                    self.put(slot)?;
                }
                0x94 => {
                    // At most MAX_VALUES, so it fits a u32.
                    let slot = self.memo.len() as u32;
                    self.put(slot)?;
                }
                // BINGET, LONG_BINGET
                b'h' => {
                    let slot = u32::from(self.byte()?);
                    self.get(slot)?;
                }
                b'j' => {
                    let slot = self.u32()?;
                    self.get(slot)?;
                }
                // NONE, NEWTRUE, NEWFALSE
                b'N' => self.push(Value::None)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                // BININT, BININT1, BININT2, LONG1
                b'J' => {
                    let int = self.u32()? as i32;
                    self.push(Value::Int(i64::from(int)))?;
                }
                b'K' => {
                    let int = self.byte()?;
                    self.push(Value::Int(i64::from(int)))?;
                }
                b'M' => {
                    let int = u16::from_le_bytes([self.byte()?, self.byte()?]);
                    self.push(Value::Int(i64::from(int)))?;
                }
                0x8a => {
                    let int = self.long()?;
                    self.push(Value::Int(int))?;
                }
                // BINUNICODE, SHORT_BINUNICODE
                b'X' => {
                    let len = self.u32()?;
                    self.push_text(len as usize)?;
                }
                0x8c => {
                    let len = self.byte()?;
                    self.push_text(usize::from(len))?;
                }
                // MARK, EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b'(' => self.mark()?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let items = self.pop_many(usize::from(code - 0x84))?;
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b's' => {
                    let items = self.pop_many(2)?;
                    self.set(&items)?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(&items)?;
                }
                // BINPERSID
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Storage(id))?;
                }
                // REDUCE, BUILD
                b'R' => {
                    let (arguments, callee) = (self.pop()?, self.pop()?);
                    let value = self.call(callee, arguments)?;
                    self.push(value)?;
                }
                b'b' => {
                    // Drops the attributes of a dictionary, such as a module's `_metadata`: they are not tensors.
                    self.pop()?;
                    let object = self.stack.last().ok_or_else(underflow)?;
                    if !matches!(self.pickle.value(*object), Value::Dict(_)) {
                        return Err("sets attributes of something that is not a dictionary".to_owned());
                    }
                }
                b'.' => return self.pop(),
                code => return Err(unknown(code)),
            }
        }
    }

    /// The result of a call, for the three calls that a state dict makes.
    fn call(&self, callee: Id, arguments: Id) -> Result<Value<'a>, String> {
        let &Value::Global(global) = self.pickle.value(callee) else {
            return Err("calls something that is not a function".to_owned());
        };
        match (global, self.pickle.tuple(arguments)?) {
            (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            (Global::RebuildTensor, &[storage, offset, shape, stride, _, _, ..]) => {
                Ok(Value::Tensor(RebuiltTensor { storage, offset, shape, stride }))
            }
            (Global::RebuildParameter, &[tensor, _, _]) => match self.pickle.value(tensor) {
                &Value::Tensor(rebuilt) => Ok(Value::Tensor(rebuilt)),
                _ => Err("makes a parameter of something that is not a tensor".to_owned()),
            },
            (Global::Storage(..), _) => Err("makes a storage by a call".to_owned()),
            (_, arguments) => {
                Err(format!("passes {} arguments to a function that takes another number", arguments.len()))
            }
        }
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        if self.pickle.values.len() == MAX_VALUES {
            return Err(format!("has more than {MAX_VALUES} values"));
        }
        self.stack.push(self.pickle.values.len());
        self.pickle.values.push(value);
        Ok(())
    }

    fn push_text(&mut self, len: usize) -> Result<(), String> {
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| "has a string that is not UTF-8".to_owned())?;
        self.push(Value::Text(text))
    }

    fn mark(&mut self) -> Result<(), String> {
        if self.marks.len() == MAX_MARKS {
            return Err(format!("has more than {MAX_MARKS} marks open at once"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        // Values below a mark are off limits until the mark is popped.
        if self.marks.last().is_some_and(|&mark| self.stack.len() <= mark) {
            return Err(underflow());
        }
        self.stack.pop().ok_or_else(underflow)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, String> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        // In bounds, because `pop` never goes below a mark.
        Ok(self.stack.split_off(mark))
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        let (pairs, rest) = items.as_chunks::<2>();
        let target = *self.stack.last().ok_or_else(underflow)?;
        match &mut self.pickle.values[target] {
            Value::Dict(entries) if rest.is_empty() => entries.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Value::Dict(_) => return Err("sets a key without a value".to_owned()),
            _ => return Err("sets entries of something that is not a dictionary".to_owned()),
        }
        Ok(())
    }

    fn put(&mut self, slot: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or_else(underflow)?;
        if self.memo.len() == MAX_VALUES {
            return Err(format!("has more than {MAX_VALUES} memo entries"));
        }
        self.memo.insert(slot, top);
        Ok(())
    }

    fn get(&mut self, slot: u32) -> Result<(), String> {
        let id = *self.memo.get(&slot).ok_or_else(|| format!("gets memo entry {slot}, which was never put"))?;
        self.stack.push(id);
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(|| "is truncated".to_owned())?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// LONG1: a length, then that many bytes in two's complement.
    fn long(&mut self) -> Result<i64, String> {
        let len = usize::from(self.byte()?);
        let bytes = self.take(len)?;
        if len > 8 {
            return Err(format!("has an integer of {len} bytes; at most 8 are supported"));
        }
        let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut whole = [sign; 8];
        whole[..len].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(whole))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let len = self.bytes.iter().take(MAX_NAME + 1).position(|&b| b == b'\n');
        let len = len.ok_or_else(|| "has a class name without an end".to_owned())?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| "has a class name that is not UTF-8".to_owned())
    }

    fn global_line(&mut self) -> Result<Global, String> {
        let (module, name) = (self.line()?, self.line()?);
        Global::lookup(module, name)
    }
}

fn underflow() -> String {
    "pops a value from an empty stack".to_owned()
}

fn unknown(code: u8) -> String {
    format!("has opcode 0x{code:02x}, which no state dict needs; only tensors are supported")
}
