//! The subset of HTTP/1.1 that the server needs: requests and responses with a content length, and persistent
//! connections.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};

use super::{Asked, End, Reply};

/// A header's value.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let value =
        |line: &'a str| line.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim());
    head.lines().skip(1).find_map(value)
}

/// Answers requests one by one until the client or a fault closes the connection.
pub fn serve(stream: &TcpStream, answer: impl Fn(Asked) -> Reply) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(asked) = read(&mut reader)? {
        let Reply { status, headers, body, end } = answer(asked);
        match end {
            End::Nothing => return stream.shutdown(Shutdown::Both),
            // Until the client goes away.
            End::Stalled => return reader.read(&mut [0]).map(drop),
            End::Whole | End::Torn => {}
        }
        let mut text =
            format!("HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += "\r\n";
        let sent = if end == End::Torn { body.len() / 2 } else { body.len() };
        text += body.get(..sent).unwrap_or_default();
        writer.write_all(text.as_bytes())?;
        if end == End::Torn {
            return stream.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

fn read(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Option<Asked>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    let length = header(&head, "content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut first = head.split(' ');
    let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = query.split('&').filter_map(|pair| pair.split_once('='));
    let query: BTreeMap<String, String> = query.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Ok(Some(Asked { method: method.to_owned(), path: path.to_owned(), query, head: head.clone(), body }))
}
